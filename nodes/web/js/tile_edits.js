// Edits of tile prompts as text, as tudsr_core/prompts/edits.py tells it; tests/edits_cases.json holds both to one rule.

const SIGNS = { replace: ":", add: "+", clear: "-" };
const KINDS = { ":": "replace", "+": "add", "-": "clear" };
const SAME_REGION = 0.5;
const SAME_PICTURE = 8;
const BLANKS = " \\t\\u00a0\\u3000";
const BLANK_ENDS = new RegExp(`^[${BLANKS}]+|[${BLANKS}]+$`, "g");
const BLANK_RUNS = new RegExp(`[${BLANKS}\\r\\n]+`, "g");
// What separates words in Python; \s has a byte order mark too, and lacks the controls.
const GAPS = /[\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/;
const LINE = new RegExp(`^(\\d{1,9})[${BLANKS}]*([:+-])(.*)$`, "s");
const NUMBERS = "\\d{1,9}(?: \\d{1,9})*";
const HEADER = new RegExp(
    `^# grid (\\d{1,9})x(\\d{1,9}), tile (\\d{1,9})x(\\d{1,9}), rows (${NUMBERS}), columns (${NUMBERS})` +
        "(?:, picture ([0-9a-f]{16}))?$",
);

/** The text without blanks at its ends. */
export function strip(text) {
    return text.replace(BLANK_ENDS, "");
}

/**
 * Read the text into `byTile`, a map from tile number (from 0) to {kind, text}, the `header` that
 * remembers grid and picture, or null, and the `others`: remarks, and lines that cannot be read.
 */
export function readEdits(text) {
    const [byTile, others] = [new Map(), []];
    let header = null;
    for (const whole of (text ?? "").replace(/^\ufeff/, "").split(/\r\n|\n|\r/)) {
        const line = strip(whole);
        const [, number, sign, rest] = line.match(LINE) ?? [];
        const says = strip(rest ?? "");
        if (HEADER.test(line)) header ??= line;
        else if (number && (sign === "-") === !says) {
            const tile = Number(number) - 1;
            byTile.set(tile, then(byTile.get(tile), { kind: KINDS[sign], text: says }));
        } else if (line) others.push(line);
    }
    return { byTile, header, others };
}

/** Write what `readEdits` reads; without edits and other lines there is no header either. */
export function writeEdits({ byTile, header, others = [] }) {
    const lines = [...byTile.entries()]
        .sort(([a], [b]) => a - b)
        .map(([tile, { kind, text }]) => strip(`${tile + 1}${SIGNS[kind]} ${strip(text.replace(BLANK_RUNS, " "))}`));
    return [...(lines.length && header ? [header] : []), ...others, ...lines].join("\n");
}

/** What a tile says after an edit. */
export function applyEdit(found, edit) {
    if (!edit) return found;
    if (edit.kind !== "add") return edit.text;
    const words = new Map();
    for (const part of [...found.split(/[,\n]/), ...edit.text.split(/[,\n]/)]) {
        const word = part.split(GAPS).filter(Boolean).join(" ");
        if (word && !words.has(word.toLowerCase())) words.set(word.toLowerCase(), word);
    }
    return [...words.values()].join(", ");
}

function then(edit, later) {
    if (!edit || later.kind !== "add") return later;
    return { kind: edit.kind === "add" ? "add" : "replace", text: applyEdit(edit.text, later) };
}

/** Return the edits that still fit, as a map by the tiles of the grid and picture of `header`. */
export function fitEdits(edits, header) {
    const here = readHeader(header);
    const grid = edits.header ? readHeader(edits.header) : here;
    if (grid.picture && here.picture && differentBits(grid.picture, here.picture) > SAME_PICTURE) return new Map();
    const [across, wide] = [grid.x.starts.length, here.x.starts.length];
    const fitting = new Map();
    for (const [index, edit] of edits.byTile) {
        const [row, column] = [Math.floor(index / across), index % across];
        if (index < 0 || row >= grid.y.starts.length) continue;
        const [y, x] = [nearest(here.y, grid.y, row), nearest(here.x, grid.x, column)];
        const inner = y.shared * x.shared;
        const share = inner / (grid.y.part * grid.x.part + here.y.part * here.x.part - inner);
        const tile = y.index * wide + x.index;
        if (share >= SAME_REGION && share > (fitting.get(tile)?.share ?? 0)) fitting.set(tile, { share, edit });
    }
    return new Map([...fitting].map(([tile, { edit }]) => [tile, edit]));
}

/** Both axes of a grid: where its tiles start, how long they and the picture are. */
function readHeader(header) {
    const [, height, width, tileHeight, tileWidth, rows, columns, picture] = header.match(HEADER);
    const axis = (starts, side, length) => ({
        starts: starts.split(" ").map(Number), side: Number(side), length: Number(length), part: side / length,
    });
    return { y: axis(rows, tileHeight, height), x: axis(columns, tileWidth, width), picture };
}

/** The tile of an axis that shares most with tile `index` of another axis, then the one with the closer middle. */
function nearest(axis, other, index) {
    const [low, high] = [other.starts[index], other.starts[index] + other.side].map((edge) => edge * axis.length);
    let best = null;
    axis.starts.forEach((start, place) => {
        const [a, b] = [start * other.length, (start + axis.side) * other.length];
        const [shared, away] = [Math.min(b, high) - Math.max(a, low), Math.abs(a + b - low - high)];
        if (!best || shared > best.shared || (shared === best.shared && away < best.away))
            best = { index: place, shared, away };
    });
    return { index: best.index, shared: Math.max(0, best.shared) / (axis.length * other.length) };
}

function differentBits(one, other) {
    let bits = 0;
    for (let rest = BigInt(`0x${one}`) ^ BigInt(`0x${other}`); rest; rest &= rest - 1n) bits++;
    return bits;
}
