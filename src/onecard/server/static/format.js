// Numbers as people read them, always with their unit, from which no line break parts them.

export const NONE = "\u2013"; // where there is no number
const SPACE = "\u00a0";

/** About three significant digits, never in exponent form. */
export function significant(value, digits = 3) {
  if (!Number.isFinite(value)) return NONE;
  const decimals = value === 0 ? 0 : Math.min(Math.max(digits - 1 - Math.floor(Math.log10(Math.abs(value))), 0), 4);
  return value.toLocaleString("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
}

const known = (format) => (value) => (Number.isFinite(value) ? format(value) : NONE);

export const seconds = known((value) => {
  if (value === 0) return `0${SPACE}ms`;
  if (value < 1e-3) return `${significant(value * 1e6)}${SPACE}µs`;
  return value < 1 ? `${significant(value * 1e3)}${SPACE}ms` : `${significant(value)}${SPACE}s`;
});
export const count = known((value) => {
  for (const [unit, size] of [["G", 1e9], ["M", 1e6]]) if (value >= size) return `${significant(value / size)}${SPACE}${unit}`;
  return value >= 100 || Number.isInteger(value) ? Math.round(value).toLocaleString("en-US") : significant(value);
});
export const rate = known((value) => `${count(value)}/s`);
export const percent = known((value) => `${significant(value * 100)}${SPACE}%`);
export const celsius = known((value) => `${Math.round(value)}${SPACE}°C`);
export const watts = known((value) => `${significant(value)}${SPACE}W`);
export const hertz = known((value) => (value >= 1e9 ? `${significant(value / 1e9)}${SPACE}GHz` : `${significant(value / 1e6)}${SPACE}MHz`));
export const bytes = known((value) => {
  let size = value;
  for (const unit of ["B", "KiB", "MiB", "GiB", "TiB"]) {
    if (Math.abs(size) < 1024 || unit === "TiB") return unit === "B" ? `${Math.round(size)}${SPACE}B` : `${significant(size)}${SPACE}${unit}`;
    size /= 1024;
  }
  return NONE;
});

/** How long something has been so: `4 s`, `3 min 20 s`, `1 h 04 min`, `2 d 3 h`. */
export const waited = known((value) => {
  const whole = Math.max(0, Math.round(value));
  const two = (part) => String(part).padStart(2, "0");
  if (whole < 60) return `${whole}${SPACE}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)}${SPACE}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
});

export const clock = (time_s) => new Date(time_s * 1000).toLocaleTimeString([], { hour12: false });
export const shape = (sizes) => `[${sizes.map((size) => (size < 0 ? "any" : size)).join(", ")}]`;
export const tensor = (each) => `${each.name}: ${each.datatype} ${shape(each.shape)}`;
