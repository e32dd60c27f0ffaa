// A line chart of the last minutes: SVG for the eyes, its label and a table for everybody else.
import { draw, make, say } from "./elements.js";
import { HISTORY_S } from "./figures.js";
import { NONE, clock } from "./format.js";

const HEIGHT = 138;
const MARGIN = { left: 62, right: 8, top: 8, bottom: 19 };
const SPANS_S = [60, 120, HISTORY_S]; // of the time axis: the least that holds all there is
const GAP_S = 3.5; // further apart than this, two points are not joined

/** The least of 1, 2, 2.5, 5 times a power of the base's ten that is not below; for bytes of 1024's. */
export function niceTop(value, step = 10) {
  if (!(value > 0)) return 1;
  const unit = step === 1024 ? 1024 ** Math.floor(Math.log(value) / Math.log(1024)) : 1;
  const scaled = value / unit;
  const power = 10 ** Math.floor(Math.log10(scaled));
  return unit * power * [1, 2, 2.5, 4, 5, 10].find((each) => each * power >= scaled * (1 - 1e-9));
}

/** Lowest, mean and highest of what is there; nulls are nothing. */
export function summary(points, of) {
  const values = points.map(of).filter(Number.isFinite);
  if (!values.length) return null;
  const total = values.reduce((all, value) => all + value, 0);
  return { low: Math.min(...values), mean: total / values.length, high: Math.max(...values) };
}

export class Chart {
  #svg = draw("svg", { role: "img", height: HEIGHT, class: "plot" });
  #values = []; // one element a series, with its value now or under the pointer
  #when = make("span", { class: "when" });
  #points = [];
  #cursor = null; // a time in seconds
  #span_s = SPANS_S[0];

  /** @param {{title, series: {name, of, format?}[], format, top?, step?, whole?}} what: `of` gives a point's value, `top`
   *  of a point the least height of the scale, `step` 1024 for bytes, `whole` that its values are whole. */
  constructor(what) {
    this.what = what;
    const keys = what.series.map((series, i) => {
      const value = make("b", {}, NONE);
      this.#values.push(value);
      const line = draw("svg", { class: "line", viewBox: "0 0 22 10", "aria-hidden": "true" });
      line.append(draw("path", { d: "M0 5H22", class: `curve s${i}` }));
      return make("li", {}, line, `${series.name} `, value);
    });
    const legend = make("ul", { class: "legend" }, ...keys);
    this.element = make("figure", {}, make("figcaption", {}, make("h3", {}, what.title, this.#when), legend), this.#svg);
    this.#svg.addEventListener("pointermove", (event) => this.#point(event));
    this.#svg.addEventListener("pointerleave", () => this.#leave());
    new ResizeObserver(() => this.#draw()).observe(this.element);
  }

  update(points) {
    this.#points = points;
    const age_s = points.length ? points[points.length - 1].time_s - points[0].time_s : 0;
    this.#span_s = SPANS_S.find((span_s) => age_s <= span_s) ?? HISTORY_S;
    this.#draw();
  }

  /** Rows of a table that says the same: name, now, lowest, mean and highest. */
  rows() {
    const last = this.#points[this.#points.length - 1];
    return this.what.series.map((series) => {
      const format = series.format ?? this.what.format;
      const found = summary(this.#points, series.of);
      const cells = [last ? series.of(last) : NaN, found?.low, found?.mean, found?.high];
      return [`${this.what.title}: ${series.name}`, ...cells.map((value) => (Number.isFinite(value) ? format(value) : NONE))];
    });
  }

  #point(event) {
    if (!this.#points.length) return;
    const box = this.#svg.getBoundingClientRect();
    const share = (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    this.#cursor = this.#points[this.#points.length - 1].time_s - this.#span_s * (1 - Math.min(Math.max(share, 0), 1));
    this.#draw();
  }

  #leave() {
    this.#cursor = null;
    this.#draw();
  }

  /** The point that is told of: the one under the pointer, else the newest. */
  #told() {
    const last = this.#points[this.#points.length - 1];
    if (this.#cursor === null || !last) return last;
    const distance = (each) => Math.abs(each.time_s - this.#cursor);
    return this.#points.reduce((best, each) => (distance(each) < distance(best) ? each : best), last);
  }

  #draw() {
    const { series, format } = this.what;
    const told = this.#told();
    series.forEach((each, i) => {
      const value = told ? each.of(told) : NaN;
      say(this.#values[i], Number.isFinite(value) ? (each.format ?? format)(value) : NONE);
    });
    say(this.#when, this.#cursor !== null && told ? `at ${clock(told.time_s)}` : "");
    const width = Math.floor(this.#svg.getBoundingClientRect().width);
    if (!width) return;
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.#svg.setAttribute("aria-label", this.#spoken());
    this.#svg.replaceChildren(...this.#lines(width, told));
  }

  #spoken() {
    const told = this.rows().map(([name, now, low, , high]) => `${name.split(": ").pop()} ${now}, from ${low} to ${high}`);
    return `${this.what.title}, the last ${HISTORY_S / 60} minutes: ${told.join("; ")}`;
  }

  #lines(width, told) {
    const { series, format, step } = this.what;
    const last = this.#points[this.#points.length - 1];
    const peak = Math.max(...series.map((each) => summary(this.#points, each.of)?.high ?? 0), 0);
    const least = last && this.what.top ? this.what.top(last) : undefined;
    let top = niceTop(Math.max(peak, least ?? 0), step);
    if (Number.isFinite(least) && peak <= least) top = least;
    if (this.what.whole) top = Math.max(top, 2);
    const now = last?.time_s ?? 0;
    const x = (time_s) => MARGIN.left + (width - MARGIN.left - MARGIN.right) * (1 - (now - time_s) / this.#span_s);
    const y = (value) => MARGIN.top + (HEIGHT - MARGIN.top - MARGIN.bottom) * (1 - value / top);
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const at = Math.round(y(top * share)) + 0.5;
      parts.push(draw("path", { d: `M${MARGIN.left} ${at}H${width - MARGIN.right}`, class: share ? "grid" : "axis" }));
      if (last && (peak > 0 || share === 0 || Number.isFinite(least))) {
        const text = share ? format(top * share) : "0";
        parts.push(draw("text", { x: MARGIN.left - 7, y: at + 4, "text-anchor": "end", class: "tick" }, text));
      }
    }
    for (const [ago, anchor] of [[this.#span_s, "start"], [this.#span_s / 2, "middle"], [0, "end"]]) {
      const text = ago ? `${ago < 60 ? `${ago} s` : `${ago / 60} min`} ago` : "now";
      parts.push(draw("text", { x: x(now - ago), y: HEIGHT - 4, "text-anchor": anchor, class: "tick" }, text));
    }
    series.forEach((each, i) => parts.push(...curve(this.#points, each.of, x, y, i)));
    if (this.#cursor !== null && told) {
      parts.push(draw("path", { d: `M${x(told.time_s)} ${MARGIN.top}V${HEIGHT - MARGIN.bottom}`, class: "cursor" }));
    }
    return parts;
  }
}

/** A series as a line that is broken where nothing is known, and a dot at its end. */
function curve(points, of, x, y, i) {
  let path = "";
  let before = null;
  let end = null;
  for (const each of points) {
    const value = of(each);
    if (!Number.isFinite(value)) {
      before = null;
      continue;
    }
    const joined = before && each.time_s - before.time_s <= GAP_S;
    path += `${joined ? "L" : "M"}${x(each.time_s).toFixed(1)} ${y(value).toFixed(1)}`;
    before = end = each;
  }
  if (!end) return [];
  const line = draw("path", { d: path, class: `curve s${i}` });
  const dot = draw("circle", { cx: x(end.time_s), cy: y(of(end)), r: 2.5, class: `dot s${i}` });
  return [line, dot];
}
