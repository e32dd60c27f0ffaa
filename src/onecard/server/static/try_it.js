// The form that sends one request to a model: a picture, text or JSON.
import { showAnswer, showFailure, startAnswer } from "./answer.js";
import { ask, refusal } from "./client.js";
import { byId, make, say, show } from "./elements.js";
import { keyOf } from "./figures.js";
import { tensor } from "./format.js";
import { PRESETS, drawFitted, drawPattern, number, perChannel, pictureBytes, pictureInput } from "./picture.js";
import { binaryRequest, example, filled } from "./protocol.js";

const VALUES = ["scale", "mean", "deviation"];
let models = [];
let shown = ""; // what the form is made for: the model and its inputs
let picture = null; // an ImageBitmap, once one is chosen
const kind = () => document.querySelector('input[name="kind"]:checked')?.value ?? "json";
const model = () => models.find((each) => keyOf(each) === byId("try-model").value) ?? models[0];
const canvas = () => byId("canvas").getContext("2d", { willReadFrequently: true });

export function startTryIt() {
  startAnswer();
  byId("try-model").addEventListener("change", showModel);
  for (const each of document.querySelectorAll('input[name="kind"]')) each.addEventListener("change", showKind);
  byId("file").addEventListener("change", (event) => choose(event.target.files[0]));
  for (const id of ["width", "height", "fit"]) byId(id).addEventListener("change", drawPicture);
  byId("layout").addEventListener("change", () => showPictureInput(pictureInput(model(), byId("layout").value)));
  byId("preset").addEventListener("change", showPreset);
  for (const id of VALUES) byId(id).addEventListener("input", () => (byId("preset").value = "own"));
  byId("example").addEventListener("click", showExample);
  byId("try-form").addEventListener("submit", submit);
  listenForPictures();
  showPreset();
}

/** The models that may be asked; the form stays as it is while its model does. */
export function offerModels(found) {
  models = found;
  const select = byId("try-model");
  const keys = found.map(keyOf);
  if (keys.join("\t") !== [...select.options].map((option) => option.value).join("\t")) {
    const chosen = select.value;
    const several = (each) => found.filter((other) => other.name === each.name).length > 1;
    select.replaceChildren(...found.map((each) => make("option", { value: keyOf(each) }, several(each) ? `${each.name}, version ${each.version}` : each.name)));
    if (keys.includes(chosen)) select.value = chosen;
  }
  show(byId("try-body"), found.length > 0);
  show(byId("try-note"), !found.length);
  if (found.length && shown !== JSON.stringify([keyOf(model()), model().inputs])) showModel();
}

function showModel() {
  const asked = model();
  shown = JSON.stringify([keyOf(asked), asked.inputs]);
  say(byId("try-inputs"), `Takes ${asked.inputs.map(tensor).join("; ")}.`);
  const input = pictureInput(asked);
  const takes = { picture: input !== null, text: asked.inputs.length > 0 && asked.inputs.every((each) => each.datatype === "BYTES"), json: true };
  for (const [name, can] of Object.entries(takes)) byId(`kind-${name}`).disabled = !can;
  byId(`kind-${Object.keys(takes).find((name) => takes[name])}`).checked = true;
  if (input) showPictureInput(input);
  byId("as-text").replaceChildren(...asked.inputs.flatMap(({ name, shape }, i) => textField(name, shape, i)));
  showExample();
  showKind();
}

function textField(name, shape, i) {
  const each = isLines(shape) ? ", a line for each row" : "";
  return [make("label", { for: `text-${i}` }, `${name}${each}`), make("textarea", { id: `text-${i}`, rows: 5 })];
}

const isLines = (shape) => shape.length > 0 && shape[0] < 0;

function showKind() {
  for (const name of ["picture", "text", "json"]) show(byId(`as-${name}`), kind() === name);
}

function showExample() {
  byId("json").value = JSON.stringify(example(model()), null, 2);
}

function showPictureInput({ layout, height, width, free, both }) {
  byId("layout").value = layout;
  byId("width").value = width;
  byId("height").value = height;
  for (const id of ["width", "height"]) byId(id).disabled = !free;
  byId("layout").disabled = !both; // mostly the model's own shape says it
  drawPicture();
}

function showPreset() {
  const preset = PRESETS[byId("preset").value];
  if (preset) for (const id of VALUES) byId(id).value = preset[id];
}

function drawPicture() {
  const [width, height] = ["width", "height"].map((id) => Math.min(Math.max(Math.round(Number(byId(id).value)) || 1, 1), 4096));
  Object.assign(byId("canvas"), { width, height });
  if (picture) drawFitted(canvas(), picture, byId("fit").value);
  else drawPattern(canvas());
}

async function choose(file) {
  if (!file) return;
  try {
    picture = await createImageBitmap(file);
    say(byId("picture-name"), `${file.name || "The pasted picture"}, ${picture.width} × ${picture.height}`);
    drawPicture();
  } catch {
    say(byId("picture-name"), `${file.name || "What was pasted"} is not a picture that this browser can read.`);
  }
}

function listenForPictures() {
  const drop = byId("drop");
  for (const name of ["dragenter", "dragover"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    choose(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((each) => each.type.startsWith("image/"));
    if (file && !byId("as-picture").hidden) choose(file);
  });
}

/** The request as the form has it: a body and, for binary tensors, the length of its JSON.
 *  @throws {Error} a field that cannot be read */
function request() {
  if (kind() === "picture") return pictureRequest();
  const body = kind() === "text" ? textRequest() : filled(parsed(byId("json").value));
  return { body: new TextEncoder().encode(JSON.stringify(body)), jsonLength: null };
}

function parsed(text) {
  try {
    const found = JSON.parse(text);
    if (typeof found === "object" && found !== null && !Array.isArray(found)) return found;
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}`);
  }
  throw new Error('The body must be an object: {"inputs": [...]}.');
}

function textRequest() {
  return {
    inputs: model().inputs.map(({ name, shape }, i) => {
      const text = byId(`text-${i}`).value;
      const data = isLines(shape) ? text.replace(/\n$/, "").split("\n") : [text];
      return { name, datatype: "BYTES", shape: shape.map((size, axis) => (axis === 0 && size < 0 ? data.length : Math.max(size, 1))), data };
    }),
  };
}

function pictureRequest() {
  const { name, datatype, layout, channels, batched } = pictureInput(model(), byId("layout").value);
  const scale = number(byId("scale").value);
  if (!Number.isFinite(scale)) throw new Error('"Times" must be a number, such as 0.5 or 1/255.');
  const [mean, deviation] = ["mean", "deviation"].map((id) => perChannel(byId(id).value, channels, id === "mean" ? "minus, a channel" : "divided by"));
  if (deviation.includes(0)) throw new Error('"divided by" must not be 0.');
  const { width, height } = byId("canvas");
  const pixels = canvas().getImageData(0, 0, width, height).data;
  const bytes = pictureBytes(pixels, { layout, channels, order: byId("order").value, scale, mean, deviation, datatype });
  const sizes = layout === "NCHW" ? [channels, height, width] : [height, width, channels];
  return binaryRequest([{ name, datatype, shape: batched ? [1, ...sizes] : sizes, bytes }]);
}

async function submit(event) {
  event.preventDefault();
  const began = performance.now();
  const took_s = () => (performance.now() - began) / 1000;
  byId("send").disabled = true;
  say(byId("sending"), "waiting for the answer …");
  try {
    await send(model(), request(), took_s);
  } catch (error) {
    showFailure(error.name === "TypeError" || error.name === "TimeoutError" ? `The server did not answer: ${error.message}.` : error.message, error.status, took_s());
  } finally {
    byId("send").disabled = false;
    say(byId("sending"), "");
  }
}

async function send(asked, { body, jsonLength }, took_s) {
  const version = asked.version ? `/versions/${encodeURIComponent(asked.version)}` : "";
  const several = models.filter((each) => each.name === asked.name).length > 1;
  const path = `v2/models/${encodeURIComponent(asked.name)}${several ? version : ""}/infer`;
  const headers = jsonLength === null ? { "Content-Type": "application/json" } : { "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": String(jsonLength) };
  const response = await ask(path, { method: "POST", headers, body });
  if (!response.ok) throw await refusal(response);
  const buffer = await response.arrayBuffer();
  const length = response.headers.get("Inference-Header-Content-Length");
  showAnswer({ buffer, jsonLength: length === null ? null : Number(length), took_s: took_s(), sent: body.length });
}
