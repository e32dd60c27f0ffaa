// Sorts the candidates by a column. Each candidate is one tbody, so its details move with it.
for (const table of document.querySelectorAll("table.candidates")) {
  const heads = [...table.tHead.rows[1].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (body) => body.rows[0].cells[column].dataset.v;
      const rank = (a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -order : order;
      };
      table.append(...[...table.tBodies].sort(rank));
    });
  });
}
// What is folded away on the screen is open on paper.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
