// Shows what the server answered to a try: how long it took, every output in figures, the best of a vector, the JSON.
import { byId, draw, make, say, show } from "./elements.js";
import { bytes, count, seconds, shape, significant } from "./format.js";
import { elements, greatest, readAnswer, softmax, statistics } from "./protocol.js";

const TOP = 5;
const MAX_RAW = 20_000; // characters of JSON that are shown
const LISTED = 12; // so many values are shown as they are

let answer = null; // the outputs that are shown
let labels = [];

export function startAnswer() {
  byId("softmax").addEventListener("change", showOutputs);
  byId("labels").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    labels = file ? (await file.text()).split(/\r?\n/) : [];
    showOutputs();
  });
}

/** A request that was refused, or never got there. */
export function showFailure(message, status, took_s) {
  answer = null;
  const where = status ? `${status} after ${seconds(took_s)}: ` : "";
  byId("answer-status").className = "failed";
  say(byId("answer-status"), `${where}${message}`);
  byId("answer-body").replaceChildren();
  show(byId("answer-options"), false);
  show(byId("raw-box"), false);
}

/** @param {{status: number, buffer: ArrayBuffer, jsonLength: number | null, took_s: number, sent: number}} got */
export function showAnswer(got) {
  answer = readAnswer(got.buffer, got.jsonLength);
  byId("answer-status").className = "";
  const size = `${bytes(got.sent)} sent, ${bytes(got.buffer.byteLength)} received`;
  say(byId("answer-status"), `Answered in ${seconds(got.took_s)}, from sending to the last byte; ${size}.`);
  const text = JSON.stringify(answer.head, null, 1);
  const binary = got.jsonLength === null ? "" : "\n(the values came as binary tensors)";
  say(byId("raw"), text.length > MAX_RAW ? `${text.slice(0, MAX_RAW)}\n… ${count(text.length - MAX_RAW)} characters more` : text + binary);
  show(byId("raw-box"), true);
  showOutputs();
}

function showOutputs() {
  if (!answer) return;
  const rows = answer.outputs.map(({ name, datatype, shape: sizes, values }) => {
    const found = statistics(values);
    const figures = found ? [found.low, found.high, found.mean, found.deviation].map((value) => make("td", { class: "n" }, figure(value))) : [make("td", { colspan: 4 }, firstOf(values))];
    return make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, `${datatype} ${shape(sizes)}`), ...figures);
  });
  const heads = ["Output", "Type and shape", "Least", "Greatest", "Mean", "Deviation"];
  const head = make("thead", {}, make("tr", {}, ...heads.map((text, i) => make("th", { scope: "col", class: i > 1 ? "n" : false }, text))));
  const table = make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Outputs" }, make("table", { class: "plain" }, head, make("tbody", {}, ...rows)));
  const missing = answer.outputs.filter(({ values }) => statistics(values)?.missing);
  const notes = missing.map(({ name, values }) => make("p", { class: "failed" }, `${name}: ${count(statistics(values).missing)} values are not finite.`));
  const vectors = answer.outputs.filter(isVector);
  byId("answer-body").replaceChildren(table, ...notes, ...vectors.map(best), ...answer.outputs.filter(isShort).map(listed));
  show(byId("answer-options"), vectors.length > 0);
}

const figure = (value) => (value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : significant(value));
const firstOf = (values) => values.slice(0, LISTED).map(String).join(", ").slice(0, 200) || "nothing";
const rowSize = (output) => output.shape[output.shape.length - 1] ?? 1;
const isNumeric = (output) => typeof output.values[0] === "number";
const isVector = (output) => isNumeric(output) && output.shape.length > 0 && output.shape.length <= 2 && rowSize(output) > 1;
const isShort = (output) => isNumeric(output) && !isVector(output) && output.values.length <= LISTED;
const listed = (output) => make("p", { class: "note" }, `${output.name}: ${output.values.map(figure).join(", ")}`);

/** The greatest values of a vector, or of the first row of several. */
function best(output) {
  const row = output.values.slice(0, rowSize(output));
  const values = byId("softmax").checked ? softmax(row) : row;
  const shown = greatest(values, TOP);
  const reach = Math.max(...shown.map(({ value }) => Math.abs(value)), Number.MIN_VALUE);
  const rows = shown.map(({ value, place }) => {
    const bar = draw("svg", { class: "meter", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
    bar.append(draw("rect", { class: "back", width: 100, height: 10 }), draw("rect", { width: (100 * Math.max(value, 0)) / reach, height: 10 }));
    const name = labels[place] ? `${place}  ${labels[place]}` : String(place);
    return make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "bar-cell" }, bar), make("td", { class: "n" }, figure(value)));
  });
  const count_ = elements(output.shape) / row.length;
  const caption = `${output.name}: the greatest ${shown.length} of ${count(row.length)}${count_ > 1 ? `, row 1 of ${count(count_)}` : ""}`;
  return make("table", { class: "top" }, make("caption", {}, caption), make("tbody", {}, ...rows));
}
