// The transcript browser's data: columns over (sample, exit layer), packed by transcripts.py, unpacked when asked for.
// A part is either in the page, or in a sidecar file that the reader has opened: nothing is fetched.

const data = JSON.parse(document.getElementById("transcripts-data").textContent);
const numLayers = data.exitLayers.length;
const asJson = (buffer) => JSON.parse(new TextDecoder().decode(buffer));
const asBytes = (buffer) => new Uint8Array(buffer);
const asCounts = (buffer) => new Uint32Array(buffer);
const READERS = {
  ids: asJson, labels: asJson, kinds: asBytes, finish: asBytes, hashes: asBytes, categories: asCounts,
  tokens: asCounts, chars: asCounts, codes: asCounts, scores: (buffer) => new Float32Array(buffer),
};
const unpacked = new Map();
let sidecar = null;

// `scores0.2`: of run 0 and its third judge's measure
function column(name) {
  if (!unpacked.has(name)) {
    const read = READERS[name.match(/^[a-z]+/)[0]];
    unpacked.set(name, unpack(data.columns[name]).then(read));
  }
  return unpacked.get(name);
}

const columns = (names) => Promise.all(names.map(column));

// [run][layer]; null where the texts are not at hand
async function textsOf(sample) {
  const isAtHand = data.texts.length && (typeof data.texts[sample] === "string" || sidecar);
  return isAtHand ? asJson(await unpack(data.texts[sample])) : null;
}

const hasColumns = () => typeof data.columns.ids === "string" || sidecar !== null;

async function unpack(where) {
  const base64 = typeof where === "string" ? where : await sidecar.slice(where[0], where[0] + where[1]).text();
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

// whether the file is this report's
async function takeSidecar(file) {
  const heading = (await file.slice(0, 200).text()).split("\n")[0];
  if (heading !== data.sidecar.heading || file.size !== data.sidecar.bytes) return false;
  sidecar = file;
  return true;
}
