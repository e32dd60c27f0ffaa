// The Open Inference Protocol from the client's side: requests of binary tensors, answers to arrays. No page here.

const ALIGNMENT_BYTES = 8; // of the first tensor: no datatype needs more
const SIZES = { BOOL: 1, UINT8: 1, INT8: 1, UINT16: 2, INT16: 2, FP16: 2, BF16: 2, UINT32: 4, INT32: 4, FP32: 4, UINT64: 8, INT64: 8, FP64: 8 };
const READERS = {
  BOOL: (view, at) => view.getUint8(at), UINT8: (view, at) => view.getUint8(at), INT8: (view, at) => view.getInt8(at),
  UINT16: (view, at) => view.getUint16(at, true), INT16: (view, at) => view.getInt16(at, true),
  UINT32: (view, at) => view.getUint32(at, true), INT32: (view, at) => view.getInt32(at, true),
  UINT64: (view, at) => Number(view.getBigUint64(at, true)), INT64: (view, at) => Number(view.getBigInt64(at, true)),
  FP32: (view, at) => view.getFloat32(at, true), FP64: (view, at) => view.getFloat64(at, true),
  FP16: (view, at) => fromHalf(view.getUint16(at, true)), BF16: (view, at) => fromBits(view.getUint16(at, true) * 65536),
};
const WRITERS = {
  UINT8: (view, at, value) => view.setUint8(at, clamped(value, 0, 255)), INT8: (view, at, value) => view.setInt8(at, clamped(value, -128, 127)),
  UINT16: (view, at, value) => view.setUint16(at, clamped(value, 0, 65535), true), INT16: (view, at, value) => view.setInt16(at, clamped(value, -32768, 32767), true),
  INT32: (view, at, value) => view.setInt32(at, Math.round(value), true), INT64: (view, at, value) => view.setBigInt64(at, BigInt(Math.round(value)), true),
  FP32: (view, at, value) => view.setFloat32(at, value, true), FP64: (view, at, value) => view.setFloat64(at, value, true),
  FP16: (view, at, value) => view.setUint16(at, toHalf(value), true), BF16: (view, at, value) => view.setUint16(at, toBrain(value), true),
};
export const WRITABLE = Object.keys(WRITERS);

const clamped = (value, low, high) => Math.min(Math.max(Math.round(value), low), high);
const scratch = new DataView(new ArrayBuffer(4));

function fromBits(bits) {
  scratch.setUint32(0, bits);
  return scratch.getFloat32(0);
}

export function fromHalf(bits) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const size = exponent === 0 ? fraction * 2 ** -24 : exponent === 31 ? (fraction ? NaN : Infinity) : (1 + fraction / 1024) * 2 ** (exponent - 15);
  return bits & 32768 ? -size : size;
}

/** The nearest half-precision number; ties go to the even one. */
export function toHalf(value) {
  const sign = value < 0 || Object.is(value, -0) ? 32768 : 0;
  const size = Math.abs(value);
  if (Number.isNaN(value)) return 32256;
  if (size >= 65520) return sign | 31744;
  const exponent = Math.max(Math.floor(Math.log2(size || 2 ** -14)), -14);
  const steps = size / 2 ** (exponent - 10); // below 2048; from 1024 on it is a normal number
  const whole = Math.floor(steps);
  const rounded = whole + (steps - whole > 0.5 || (steps - whole === 0.5 && whole % 2) ? 1 : 0);
  return sign | (rounded + (exponent + 14) * 1024);
}

function toBrain(value) {
  scratch.setFloat32(0, value);
  const bits = scratch.getUint32(0);
  return Number.isNaN(value) ? 32704 : ((bits + 32767 + ((bits >>> 16) & 1)) >>> 16) & 65535;
}

export const elements = (shape) => shape.reduce((product, size) => product * size, 1);

/** Numbers as the bytes of a datatype. */
export function encode(values, datatype) {
  const bytes = new Uint8Array(values.length * SIZES[datatype]);
  if (datatype === "UINT8") return Uint8Array.from(values, (value) => clamped(value, 0, 255));
  const view = new DataView(bytes.buffer);
  values.forEach((value, i) => WRITERS[datatype](view, i * SIZES[datatype], value));
  return bytes;
}

/** A request of binary tensors.
 *  @param {{name, datatype, shape, bytes: Uint8Array}[]} inputs
 *  @returns {{body: Uint8Array, jsonLength: number}} `jsonLength` goes into `Inference-Header-Content-Length` */
export function binaryRequest(inputs) {
  const head = {
    inputs: inputs.map(({ name, datatype, shape, bytes }) => ({ name, datatype, shape, parameters: { binary_data_size: bytes.length } })),
    parameters: { binary_data_output: true },
  };
  let json = new TextEncoder().encode(JSON.stringify(head));
  const padding = -json.length & (ALIGNMENT_BYTES - 1); // white space behind the JSON is JSON
  json = new Uint8Array([...json, ...Array(padding).fill(32)]);
  const body = new Uint8Array(json.length + inputs.reduce((total, each) => total + each.bytes.length, 0));
  body.set(json);
  let at = json.length;
  for (const { bytes } of inputs) {
    body.set(bytes, at);
    at += bytes.length;
  }
  return { body, jsonLength: json.length };
}

/** An answer: its JSON, and the outputs with their values (numbers, true or false, or text).
 *  @param {ArrayBuffer} buffer the whole body
 *  @param {number | null} jsonLength of `Inference-Header-Content-Length` */
export function readAnswer(buffer, jsonLength) {
  const length = jsonLength ?? buffer.byteLength;
  const head = parsedJson(new TextDecoder().decode(new Uint8Array(buffer, 0, length)));
  let at = length;
  const outputs = (head.outputs ?? []).map((output) => {
    const { name, datatype, shape } = output;
    const size = output.parameters?.binary_data_size;
    if (size === undefined) {
      const values = (output.data ?? []).flat(Infinity);
      return { name, datatype, shape, values: /^(FP|BF)/.test(datatype) ? values.map(Number) : values };
    }
    if (at + size > buffer.byteLength) throw new Error(`The answer ends before output "${name}" does.`);
    const values = decode(new DataView(buffer, at, size), datatype);
    at += size;
    return { name, datatype, shape, values };
  });
  return { head, outputs };
}

/** JSON in which NaN and infinity may stand as such, which servers send and JSON.parse refuses: they become texts. */
function parsedJson(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    const quoted = text.replace(/(?<=[[,:\s])(-?Infinity|NaN)(?=[\],}\s])/g, '"$1"');
    if (quoted === text) throw error;
    return JSON.parse(quoted);
  }
}

function decode(view, datatype) {
  if (datatype === "BYTES") return texts(view);
  const size = SIZES[datatype];
  if (!size) throw new Error(`The answer has the unknown datatype "${datatype}".`);
  const read = READERS[datatype];
  return Array.from({ length: view.byteLength / size }, (_, i) => read(view, i * size));
}

function texts(view) {
  const found = [];
  for (let at = 0; at + 4 <= view.byteLength; ) {
    const length = view.getUint32(at, true);
    found.push(new TextDecoder().decode(new Uint8Array(view.buffer, view.byteOffset + at + 4, Math.min(length, view.byteLength - at - 4))));
    at += 4 + length;
  }
  return found;
}

/** Put as many values as a shape has in the place of each `"data": {"fill": 0.5}`. */
export function filled(request) {
  const inputs = (request.inputs ?? []).map((input) => {
    const fill = input?.data?.fill;
    return fill === undefined || Array.isArray(input.data) ? input : { ...input, data: Array(elements(input.shape)).fill(fill) };
  });
  return request.inputs ? { ...request, inputs } : request;
}

const LISTED = 24; // more values than this are written as a fill

/** A request that a model can answer, made of its metadata; what may be any size is 1. */
export function example(model) {
  const inputs = model.inputs.map(({ name, datatype, shape }) => {
    const sizes = shape.map((size) => (size < 0 ? 1 : size));
    const value = datatype === "BYTES" ? "text" : datatype === "BOOL" ? true : /^(FP|BF)/.test(datatype) ? 0.5 : 1;
    const data = elements(sizes) <= LISTED ? Array(elements(sizes)).fill(value) : { fill: value };
    return { name, datatype, shape: sizes, data };
  });
  return { inputs };
}

/** Least, greatest, mean and standard deviation of what is a number; null where nothing is. */
export function statistics(values) {
  const numbers = values.map(Number).filter(Number.isFinite);
  if (!numbers.length || typeof values[0] === "string") return null;
  let [low, high, total] = [Infinity, -Infinity, 0];
  for (const value of numbers) [low, high, total] = [Math.min(low, value), Math.max(high, value), total + value];
  const mean = total / numbers.length;
  const variance = numbers.reduce((sum, value) => sum + (value - mean) ** 2, 0) / numbers.length;
  return { low, high, mean, deviation: Math.sqrt(variance), missing: values.length - numbers.length };
}

/** The greatest values with their places, the greatest first. */
export function greatest(values, count) {
  return values.map((value, place) => ({ value, place })).sort((a, b) => b.value - a.value).slice(0, count);
}

export function softmax(values) {
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = values.map((value) => Math.exp(value - high));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}
