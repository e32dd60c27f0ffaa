// Figures from what the server tells of itself: rates and percentiles are made of the difference of two snapshots.
// No page here: everything is a function of its arguments.

export const HISTORY_S = 300; // how far back the charts go
export const WINDOW_S = 5; // over how long a rate or a percentile is taken
export const STAGES = ["queue_s", "copy_in_s", "compute_s", "copy_out_s"];
const ALL = "";

/** What a model is called in the page: two versions are two models. */
export const keyOf = (model) => `${model.name}\n${model.version ?? ""}`;

const sum = (values) => values.reduce((total, value) => total + value, 0);
const failuresOf = (model) => sum(Object.values(model.failures ?? {}));

/** The value below which a share of the observations lies, linear inside a bucket; null where there are none.
 *  `counts` has one entry more than `bounds`, for what is above the last; of that only the last bound is known. */
export function percentile(bounds, counts, share) {
  const total = sum(counts);
  if (!(total > 0) || !bounds.length) return null;
  const rank = share * total;
  let before = 0;
  for (let i = 0; i < bounds.length; i++) {
    if (counts[i] > 0 && before + counts[i] >= rank) {
      const low = i ? bounds[i - 1] : 0;
      return low + (bounds[i] - low) * ((rank - before) / counts[i]);
    }
    before += counts[i];
  }
  return bounds[bounds.length - 1];
}

/** What was observed between two states of a histogram; null where they do not belong together. */
export function since(newer, older) {
  if (!newer?.bounds.length || !older) return null;
  if (!older.bounds.length) return newer; // nothing had been observed
  if (newer.bounds.length !== older.bounds.length) return null;
  if (newer.bounds.some((bound, i) => bound !== older.bounds[i])) return null;
  const counts = newer.counts.map((count, i) => count - older.counts[i]);
  return counts.some((count) => count < 0) ? null : { bounds: newer.bounds, counts, sum: newer.sum - older.sum };
}

/** Several histograms as one; those whose bounds are not those of the first are left out. */
function merged(histograms) {
  const kept = histograms.filter(Boolean);
  if (!kept.length) return null;
  const bounds = kept[0].bounds;
  const same = kept.filter((each) => each.bounds.length === bounds.length && each.bounds.every((b, i) => b === bounds[i]));
  return { bounds, counts: bounds.concat(0).map((_, i) => sum(same.map((each) => each.counts[i]))), sum: sum(same.map((each) => each.sum)) };
}

/** Whether the server's counters began anew between two snapshots. */
export function isRestart(newer, older) {
  if (newer.server.started_s !== older.server.started_s || newer.time_s < older.time_s) return true;
  const known = new Map(older.models.map((model) => [keyOf(model), model]));
  return newer.models.some((model) => {
    const was = known.get(keyOf(model));
    return was && (model.requests < was.requests || failuresOf(model) < failuresOf(was));
  });
}

/** Each model with its figures in the oldest of the recent snapshots that has it (one may have been loaded meanwhile),
 *  and the seconds between. */
function pairs(models, now, recent) {
  return models.flatMap((model) => {
    for (const past of recent) {
      const was = past.models.find((each) => keyOf(each) === keyOf(model));
      if (was) return now.time_s > past.time_s ? [[model, was, now.time_s - past.time_s]] : [];
    }
    return [];
  });
}

/** One point of the charts of one model, or with "" of all of them: seconds and things per second.
 *  @param {object[]} recent the snapshots of the last seconds, the oldest first */
export function point(now, recent, key) {
  const models = now.models.filter((model) => key === ALL || keyOf(model) === key);
  const found = {
    time_s: now.time_s,
    queue: sum(models.map((model) => model.queue_requests ?? 0)),
    in_flight: sum(models.map((model) => model.in_flight ?? 0)),
  };
  const both = pairs(models, now, recent);
  if (!both.length) return found;
  const rate = (of) => sum(both.map(([model, was, seconds]) => Math.max(of(model) - of(was), 0) / seconds));
  found.requests_per_s = rate((model) => model.requests ?? 0);
  found.rows_per_s = rate((model) => model.rows ?? 0);
  found.failures_per_s = rate(failuresOf);
  const batches_per_s = rate((model) => model.batches ?? 0);
  if (batches_per_s > 0) found.batch_rows = found.rows_per_s / batches_per_s;
  const difference = (name) => merged(both.map(([model, was]) => since(model.histograms?.[name], was.histograms?.[name])));
  const latency = difference("request_s");
  if (latency) {
    for (const share of [50, 90, 99]) found[`p${share}_s`] = percentile(latency.bounds, latency.counts, share / 100);
  }
  for (const stage of STAGES) {
    const times = difference(stage);
    const count = times ? sum(times.counts) : 0;
    if (count > 0) found[`mean_${stage}`] = times.sum / count;
  }
  return found;
}

/** One point of the card's charts: its sensors as they are, and the power made of the energy where only that is told. */
export function cardPoint(now, past) {
  const card = now.card ?? {};
  const found = { ...card, time_s: now.time_s };
  const seconds = past ? now.time_s - past.time_s : 0;
  const joules = (card.energy_j ?? NaN) - (past?.card?.energy_j ?? NaN);
  if (found.power_w === undefined && seconds > 0 && joules >= 0) found.power_w = joules / seconds;
  return found;
}

/** Keeps the last minutes: points of every model, of all together ("") and of the card. */
export class History {
  #recent = []; // snapshots of the last seconds, for differences
  points = new Map(); // key to points
  card = [];

  /** Take in a snapshot; whether it was a new one. */
  add(snapshot) {
    const last = this.#recent[this.#recent.length - 1];
    if (last && snapshot.time_s === last.time_s) return false;
    if (last && (isRestart(snapshot, last) || snapshot.time_s - last.time_s > 2 * WINDOW_S)) this.#recent = [];
    // The oldest kept is the newest that is a whole window ago.
    while (this.#recent.length > 1 && snapshot.time_s - this.#recent[1].time_s >= WINDOW_S) this.#recent.shift();
    const keys = [ALL, ...snapshot.models.map(keyOf)];
    for (const key of keys) this.points.set(key, trimmed([...(this.points.get(key) ?? []), point(snapshot, this.#recent, key)]));
    for (const key of [...this.points.keys()]) if (!keys.includes(key)) this.points.delete(key);
    this.card = trimmed([...this.card, cardPoint(snapshot, this.#recent[0])]);
    this.#recent.push(snapshot);
    return true;
  }

  /** The newest point of a model or of all; empty before the first. */
  latest(key) {
    const points = this.points.get(key) ?? [];
    return points[points.length - 1] ?? {};
  }
}

/** Without what is too old, or of a time that has not come yet: the server's clock was set back. */
function trimmed(points) {
  const now = points[points.length - 1].time_s;
  return points.filter((each) => each.time_s >= now - HISTORY_S && each.time_s <= now);
}
