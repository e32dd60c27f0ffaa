// The table of what is served: one body a model, of its figures and of the details below them.
import { ask, hasToken, refusal } from "./client.js";
import { byId, make, say, show } from "./elements.js";
import { STAGES, keyOf } from "./figures.js";
import { NONE, bytes, count, percent, rate, seconds, tensor } from "./format.js";

const COLUMNS = ["State", "Variant", "Device", "Requests", "p50", "p99", "Waiting", "In flight", "Failed", "Memory", "Evidence"];
const NUMBERS = COLUMNS.slice(3, 10);
const STAGE_NAMES = { queue_s: "waiting", copy_in_s: "copying in", compute_s: "computing", copy_out_s: "copying out" };
const bodies = new Map(); // key to {element, cells, facts, why}

/** Bring the table up to date.
 *  @param {object[]} models of the state
 *  @param {(key: string) => object} latest the newest figures of a model */
export function showModels(models, latest) {
  const keys = models.map(keyOf);
  for (const [key, body] of [...bodies]) {
    if (!keys.includes(key)) {
      body.element.remove();
      bodies.delete(key);
    }
  }
  models.forEach((model, i) => {
    const key = keyOf(model);
    const body = bodies.get(key) ?? added(model);
    const place = byId("models").tBodies[i];
    if (place !== body.element) byId("models").insertBefore(body.element, place ?? null);
    update(body, model, latest(key));
  });
  show(byId("models-scroll"), models.length > 0);
}

function added(model) {
  const version = model.version ? make("small", {}, ` version ${model.version}`) : "";
  const head = make("th", { scope: "row" }, model.name, version);
  const cells = COLUMNS.map((name) => make("td", { "data-label": name, class: NUMBERS.includes(name) ? "n" : name.toLowerCase() }));
  const facts = make("dl", { class: "facts" });
  const why = make("p", { class: "why", hidden: true });
  const more = make("td", { colspan: COLUMNS.length + 1 }, why, make("details", {}, make("summary", {}, "details"), facts));
  const element = make("tbody", {}, make("tr", {}, head, ...cells), make("tr", { class: "more" }, more));
  cells[COLUMNS.length - 1].append(reportLink(model));
  const body = { element, cells, facts, why };
  bodies.set(keyOf(model), body);
  return body;
}

/** A link to the bundle's report. With a token it is fetched and kept as a file, since a link cannot carry one. */
function reportLink(model) {
  const path = `v2/onecard/models/${encodeURIComponent(model.name)}/report`;
  const link = make("a", { href: path, target: "_blank", rel: "noopener", "aria-label": `Report of ${model.name}` }, "report");
  link.addEventListener("click", async (event) => {
    if (!hasToken()) return;
    event.preventDefault();
    try {
      const response = await ask(path);
      if (!response.ok) throw await refusal(response);
      const file = URL.createObjectURL(new Blob([await response.arrayBuffer()], { type: "text/html" }));
      make("a", { href: file, download: `${model.name}-report.html` }).click();
      setTimeout(() => URL.revokeObjectURL(file), 60_000);
      say(link, "report");
    } catch (error) {
      say(link, "no report");
      link.title = error.message;
    }
  });
  return link;
}

function update({ cells, facts, why }, model, now) {
  const [state, variant, device, ...rest] = cells;
  const isReady = model.state === "READY";
  state.className = isReady ? "badge ready" : "badge not";
  say(state, isReady ? "● ready" : `○ ${(model.state || "unknown").toLowerCase().replaceAll("_", " ")}`);
  say(variant, model.variant || NONE);
  say(device, model.device || NONE);
  const memory = model.memory_bytes ?? {};
  const figures = [rate(now.requests_per_s), seconds(now.p50_s), seconds(now.p99_s), count(now.queue), count(now.in_flight)];
  [...figures, count(total(model.failures)), bytes(memory.reserved ?? memory.weights ?? NaN)].forEach((text, i) => {
    say(rest[i], text);
    rest[i].classList.toggle("none", text === NONE);
  });
  say(why, model.reason || "");
  show(why, Boolean(model.reason));
  if (facts.parentElement.open || !facts.childElementCount) showFacts(facts, factsOf(model, now));
}

const total = (counts) => Object.values(counts ?? {}).reduce((sum, value) => sum + value, 0);
const list = (counts, format) => Object.entries(counts ?? {}).filter(([, value]) => value).map(([name, value]) => `${name.replaceAll("_", " ")} ${format(value)}`).join(", ");

function factsOf(model, now) {
  const stages = STAGES.filter((stage) => now[`mean_${stage}`] !== undefined);
  const padded = model.padded_rows / (model.rows + model.padded_rows);
  const found = [
    ["Inputs", (model.inputs ?? []).map(tensor).join("; ")],
    ["Outputs", (model.outputs ?? []).map(tensor).join("; ")],
    ["Variant by size", Object.entries(model.variants ?? {}).map(([bucket, name]) => `${bucket} ${name}`).join(", ")],
    ["A request's time", stages.map((stage) => `${STAGE_NAMES[stage]} ${seconds(now[`mean_${stage}`])}`).join(", ")],
    ["Batches", `${count(model.batches)} of ${count(model.rows)} rows${Number.isFinite(now.batch_rows) ? `, now ${count(now.batch_rows)} rows each` : ""}${padded > 0 ? `, ${percent(padded)} padding` : ""}`],
    ["Answered since the start", count(model.requests)],
    ["Failed since the start", list(model.failures, count) || "none"],
    ["Waiting", `${count(model.queue_requests)} requests${Number.isFinite(model.queue_limit_requests) ? ` of at most ${count(model.queue_limit_requests)}` : ""}, ${bytes(model.queue_bytes)}`],
    ["Memory", list(model.memory_bytes, bytes)],
    ["Loaded in", seconds(model.load_s)],
    ["Target", Number.isFinite(model.p99_target_s) ? `p99 within ${seconds(model.p99_target_s)}` : ""],
    ["Better variants that cannot run here", model.skipped_variants ? count(model.skipped_variants) : ""],
    ["Answers compared", model.sentinel ? `${count(model.sentinel.checked)}, ${count(model.sentinel.wrong)} of them wrong` : ""],
  ];
  return found.filter(([, text]) => text && text !== NONE);
}

function showFacts(facts, rows) {
  if (facts.childElementCount !== 2 * rows.length) facts.replaceChildren(...rows.flatMap(() => [make("dt"), make("dd")]));
  rows.flat().forEach((text, i) => say(facts.children[i], text));
}
