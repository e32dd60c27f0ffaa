// The page: asks the server once a second how it is, and shows it.
import { Chart } from "./charts.js";
import { Refused, state, useToken } from "./client.js";
import { byId, make, say, show } from "./elements.js";
import { History, keyOf } from "./figures.js";
import { NONE, bytes, celsius, clock, count, hertz, percent, rate, seconds, waited, watts } from "./format.js";
import { showModels } from "./models.js";
import { offerModels, startTryIt } from "./try_it.js";

const EVERY_MS = 1000;
const history = new History();
let chosen = ""; // the key of the model whose charts are shown, or "" for all
let newest = null; // the last snapshot
let asked = false; // whether the token was asked for
let since = null; // Unix time since when the server does not answer

const field = (name) => (each) => each[name];
const CHARTS = [
  { title: "Throughput", format: rate, series: [{ name: "requests", of: field("requests_per_s") }, { name: "rows", of: field("rows_per_s") }, { name: "failed", of: field("failures_per_s") }] },
  { title: "Latency", format: seconds, series: [50, 90, 99].map((share) => ({ name: `p${share}`, of: field(`p${share}_s`) })) },
  { title: "Queue", format: count, whole: true, series: [{ name: "waiting", of: field("queue") }, { name: "in flight", of: field("in_flight") }] },
  { title: "Where the time goes, mean", format: seconds, series: [["queue", "queue"], ["copy in", "copy_in"], ["compute", "compute"], ["copy out", "copy_out"]].map(([name, stage]) => ({ name, of: field(`mean_${stage}_s`) })) },
].map((what) => new Chart(what));
const CARD_CHARTS = [
  { title: "Utilisation", format: percent, top: () => 1, series: [{ name: "busy", of: field("utilisation") }, { name: "its memory", of: field("memory_utilisation") }, { name: "by this server", of: field("process_utilisation") }] },
  { title: "Memory", format: bytes, step: 1024, top: field("memory_total_bytes"), series: [{ name: "used", of: field("memory_used_bytes") }, { name: "by this server", of: field("process_memory_bytes") }] },
  { title: "Temperature", format: celsius, series: [{ name: "card", of: field("temperature_c") }, { name: "memory", of: field("memory_temperature_c") }] },
  { title: "Power", format: watts, top: field("power_limit_w"), series: [{ name: "drawn", of: field("power_w") }] },
];
const cardCharts = new Map(); // title to chart, made when its sensor is first there

const TILES = [
  ["Requests", (now) => [rate(now.requests_per_s), `${count(now.rows_per_s)} rows/s`]],
  ["Latency, p50", (now) => [seconds(now.p50_s), `p99 ${seconds(now.p99_s)}`]],
  ["Failed", (now) => [rate(now.failures_per_s), `${count(failures())} since the start`]],
  ["Waiting", (now) => [count(now.queue), `${count(now.in_flight)} in flight`]],
  ["Card", (_, card) => [percent(card.utilisation), [celsius(card.temperature_c), watts(card.power_w)].filter((text) => text !== NONE).join(", ") || "utilisation"]],
].map(([name, figures]) => {
  const [value, under] = [make("div", { class: "gain" }, NONE), make("div", { class: "under" }, "\u00a0")];
  byId("tiles").append(make("li", {}, make("div", { class: "at" }, name), value, under));
  return { figures, value, under };
});

const failures = () => newest.models.reduce((sum, model) => Object.values(model.failures ?? {}).reduce((a, b) => a + b, sum), 0);

/** @param {"loading" | "ready" | "waiting" | "away" | "refused"} kind */
function showStatus(kind, text, more = "") {
  byId("status").className = `status ${kind}`;
  say(byId("status-text"), text);
  say(byId("status-more"), more);
  document.documentElement.classList.toggle("stale", newest !== null && (kind === "away" || kind === "refused"));
}

function showServer({ server, models, card, time_s }) {
  const restarts = server.engine_restarts ? ` · engine restarts: ${count(server.engine_restarts)}` : "";
  const fronts = server.fronts > 1 ? ` · ${server.fronts} fronts` : "";
  say(byId("about"), `${server.version} · up ${waited(time_s - server.started_s)} · ${count(server.open_connections)} connections${fronts}${restarts}`);
  const served = models.filter((model) => model.state === "READY");
  const what = served.length === 1 ? served[0].name : `${served.length} models`;
  say(byId("headline"), models.length ? `${what} ${served.length === 1 ? "is" : "are"} served${card?.name ? ` on ${card.name}` : ""}.` : "No model is loaded.");
  document.title = `${served.length === 1 ? served[0].name : `${served.length} models`} · onecard`;
  if (!server.live) showStatus("waiting", "The server says it is not live.");
  else if (!server.ready) showStatus("waiting", models.length ? "Not ready: a model is not ready to answer." : "Not ready: no model is loaded.");
  else showStatus("ready", "Ready");
}

function showPicker(models) {
  const keys = ["", ...models.map(keyOf)];
  if (!keys.includes(chosen)) chosen = "";
  const field = byId("which");
  show(field, models.length > 1);
  if (field.dataset.keys === keys.join("\t")) return;
  field.dataset.keys = keys.join("\t");
  const several = (model) => models.filter((other) => other.name === model.name).length > 1;
  const names = ["all", ...models.map((model) => (several(model) ? `${model.name}, version ${model.version}` : model.name))];
  const choices = keys.flatMap((key, i) => {
    const input = make("input", { class: "hidden", type: "radio", name: "which", id: `which-${i}`, checked: key === chosen });
    input.addEventListener("change", () => {
      chosen = key;
      showCharts();
    });
    return [input, make("label", { for: `which-${i}` }, names[i])];
  });
  field.replaceChildren(field.querySelector("legend"), ...choices);
}

function showCharts() {
  for (const chart of CHARTS) chart.update(history.points.get(chosen) ?? []);
  for (const what of CARD_CHARTS) {
    if (!cardCharts.has(what.title) && history.card.some((each) => what.series.some((series) => Number.isFinite(series.of(each))))) {
      const present = what.series.filter((series) => history.card.some((each) => Number.isFinite(series.of(each))));
      const chart = new Chart({ ...what, series: present });
      cardCharts.set(what.title, chart);
      byId("card-charts").append(chart.element);
    }
    cardCharts.get(what.title)?.update(history.card);
  }
  if (byId("figures").closest("details").open) showTable();
}

function showTable() {
  const rows = [...CHARTS, ...cardCharts.values()].flatMap((chart) => chart.rows());
  const cells = ([name, ...values]) => [make("th", { scope: "row" }, name), ...values.map((value) => make("td", { class: "n" }, value))];
  byId("figures").tBodies[0].replaceChildren(...rows.map((row) => make("tr", {}, ...cells(row))));
}

function showCard(card) {
  const parts = [
    card.name ?? "Nothing is told of the card",
    Number.isFinite(card.memory_total_bytes) ? `${bytes(card.memory_total_bytes)} of memory` : "",
    Number.isFinite(card.cgroup_cpus) ? `${count(card.cgroup_cpus)} cores allowed` : "",
    Number.isFinite(card.sm_clock_hz) ? `clock ${hertz(card.sm_clock_hz)}` : Number.isFinite(card.frequency_hz) ? `clock ${hertz(card.frequency_hz)}` : "",
    Number.isFinite(card.memory_clock_hz) ? `memory clock ${hertz(card.memory_clock_hz)}` : "",
    Number.isFinite(card.power_limit_w) ? `at most ${watts(card.power_limit_w)}` : "",
    card.lost ? `cannot be reached: ${card.lost}` : "",
    card.xid_errors ? `${count(card.xid_errors)} critical errors told by the driver` : "",
    card.ecc_errors ? `${count(card.ecc_errors)} memory errors` : "",
    card.throttle_reasons?.length ? `slowed down by: ${card.throttle_reasons.join(", ").replaceAll("_", " ")}` : "",
  ];
  say(byId("card-note"), parts.filter(Boolean).join(" · "));
}

function showSnapshot(snapshot) {
  newest = snapshot;
  since = null;
  if (!history.add(snapshot)) return;
  const now = history.latest("");
  for (const { figures, value, under } of TILES) {
    const [text, small] = figures(now, history.card[history.card.length - 1]);
    say(value, text);
    say(under, small);
  }
  showServer(snapshot);
  say(byId("models-note"), snapshot.models.length ? "" : "No model is loaded. Start the server with a bundle, or load one from its repository.");
  show(byId("models-note"), !snapshot.models.length);
  showModels(snapshot.models, (key) => history.latest(key));
  showPicker(snapshot.models);
  showCard(snapshot.card ?? {});
  showCharts();
  offerModels(snapshot.models.filter((model) => model.inputs?.length));
}

function showTrouble(error) {
  if (error instanceof Refused) {
    since = null;
    if (error.status === 401 && !asked) asked = byId("token-box").open = true;
    showStatus("refused", `The server refuses to tell how it is (${error.status}): ${error.message}`);
  } else {
    since ??= Date.now() / 1000;
    showStatus("away", `The server cannot be reached since ${clock(since)}.`, `That is ${waited(Date.now() / 1000 - since)}; trying again every second.`);
  }
  if (newest === null) {
    say(byId("headline"), !(error instanceof Refused) ? "No server is there." : error.status === 401 ? "A token is needed." : "The server tells nothing.");
    for (const id of ["models-note", "card-note"]) say(byId(id), "Nothing is known yet.");
  }
}

async function poll() {
  const began = performance.now();
  let snapshot = null;
  try {
    snapshot = await state();
  } catch (error) {
    showTrouble(error);
  }
  setTimeout(poll, Math.max(EVERY_MS - (performance.now() - began), EVERY_MS / 4));
  if (snapshot) showSnapshot(snapshot);
}

function startTheme() {
  const kept = readKept();
  for (const input of document.querySelectorAll('input[name="theme"]')) {
    input.checked = input.value === kept;
    input.addEventListener("change", () => useTheme(input.value));
  }
  useTheme(kept);
}

function readKept() {
  try {
    const kept = localStorage.getItem("onecard-theme");
    return ["light", "dark"].includes(kept) ? kept : "auto";
  } catch {
    return "auto"; // the browser keeps nothing for this page
  }
}

function useTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("onecard-theme", theme);
  } catch {
    // the browser keeps nothing for this page: the choice lasts as long as the page
  }
}

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(byId("token").value);
  byId("token-box").open = false;
  byId("token-box").querySelector("summary").focus();
});
byId("figures").closest("details").addEventListener("toggle", showTable);
byId("charts").append(...CHARTS.map((chart) => chart.element));
startTheme();
startTryIt();
poll();
