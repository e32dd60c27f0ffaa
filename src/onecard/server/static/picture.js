// A picture to the tensor of a model: where its height, width and channels stand, how it is fitted, and its values.
import { WRITABLE, encode } from "./protocol.js";

export const PRESETS = {
  imagenet: { scale: "1/255", mean: "0.485, 0.456, 0.406", deviation: "0.229, 0.224, 0.225" },
  unit: { scale: "1/255", mean: "0", deviation: "1" },
  signed: { scale: "1/127.5", mean: "1", deviation: "1" },
  bytes: { scale: "1", mean: "0", deviation: "1" },
};
const CHANNELS = [1, 3, 4];
const ANY_SIZE = 224; // what a free height or width is at first

/** Where a picture's dimensions stand in a model's only input; null if it takes none.
 *  @param {string} [wanted] the layout, where the shape fits both
 *  @returns {{name, datatype, layout, channels, height, width, batched, free, both} | null} `free`: its size may be
 *  chosen, `both`: its layout too */
export function pictureInput(model, wanted) {
  if (model.inputs.length !== 1) return null;
  const { name, datatype, shape } = model.inputs[0];
  if (!WRITABLE.includes(datatype) || ![3, 4].includes(shape.length)) return null;
  const batched = shape.length === 4;
  if (batched && shape[0] > 1) return null;
  const [a, b, c] = shape.slice(-3);
  const fitting = [CHANNELS.includes(a) && "NCHW", CHANNELS.includes(c) && "NHWC"].filter(Boolean);
  if (!fitting.length) return null;
  const layout = fitting.includes(wanted) ? wanted : fitting[0];
  const [channels, height, width] = layout === "NCHW" ? [a, b, c] : [c, a, b];
  const size = (value) => (value < 0 ? ANY_SIZE : value);
  return { name, datatype, layout, channels, height: size(height), width: size(width), batched, free: height < 0 || width < 0, both: fitting.length > 1 };
}

/** A number, or a fraction such as 1/255; NaN for anything else. */
export function number(text) {
  const parts = text.trim().split("/");
  if (parts.length > 2 || parts.some((part) => part.trim() === "")) return NaN;
  return parts.length === 2 ? Number(parts[0]) / Number(parts[1]) : Number(parts[0]);
}

/** One number for each channel: as many as there are, or one for all. */
export function perChannel(text, channels, what) {
  const values = text.split(",").map(number);
  if (values.some((value) => !Number.isFinite(value))) throw new Error(`"${what}" must be numbers with commas between them, such as 0.5 or 1/255.`);
  if (values.length === 1) return Array(channels).fill(values[0]);
  if (channels === 4 && values.length === 3) return [...values, values[2]];
  if (channels === 1) return [values.reduce((sum, value) => sum + value, 0) / values.length];
  if (values.length !== channels) throw new Error(`"${what}" has ${values.length} numbers, expected one or ${channels}.`);
  return values;
}

/** Draw a picture onto a canvas of the model's size.
 *  @param {"crop" | "stretch" | "pad"} fit */
export function drawFitted(context, picture, fit) {
  const { width, height } = context.canvas;
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  const [across, down] = [width / picture.width, height / picture.height];
  const scale = fit === "crop" ? Math.max(across, down) : Math.min(across, down);
  const [w, h] = fit === "stretch" ? [width, height] : [picture.width * scale, picture.height * scale];
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
}

/** Something to send before anybody chose a picture. */
export function drawPattern(context) {
  const { width, height } = context.canvas;
  const sky = context.createLinearGradient(0, 0, width, height);
  for (const [at, colour] of [[0, "#2f6fb5"], [0.55, "#e3b35c"], [1, "#7a3b6d"]]) sky.addColorStop(at, colour);
  context.fillStyle = sky;
  context.fillRect(0, 0, width, height);
  context.fillStyle = "#f7efd9";
  context.beginPath();
  context.arc(width * 0.62, height * 0.4, Math.min(width, height) * 0.18, 0, 2 * Math.PI);
  context.fill();
}

/** Pixels to the bytes of a tensor: each value is (pixel * scale - mean) / deviation.
 *  @param {Uint8ClampedArray} pixels RGBA, row after row
 *  @param {{layout, channels, order, scale, mean: number[], deviation: number[], datatype}} how */
export function pictureBytes(pixels, how) {
  const { layout, channels, order, scale, mean, deviation, datatype } = how;
  const count = pixels.length / 4;
  const values = new Float64Array(count * channels);
  const from = channels === 1 ? [0] : order === "BGR" ? [2, 1, 0, 3] : [0, 1, 2, 3];
  for (let pixel = 0; pixel < count; pixel++) {
    const at = 4 * pixel;
    const grey = 0.299 * pixels[at] + 0.587 * pixels[at + 1] + 0.114 * pixels[at + 2];
    for (let channel = 0; channel < channels; channel++) {
      const raw = channels === 1 ? grey : pixels[at + from[channel]];
      const place = layout === "NCHW" ? channel * count + pixel : pixel * channels + channel;
      values[place] = (raw * scale - mean[channel]) / deviation[channel];
    }
  }
  return encode(values, datatype);
}
