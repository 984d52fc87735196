// The tile prompt editor: the picture with its tiles, what each says, and a box to change it.
//
// The text of the node's `edits` widget is the only place where edits are: what is shown is read
// from it, what is changed is written to it. So undo, copies, tabs and API runs need nothing of
// their own here, and where this file does not run, that text box is the editor.

import { app } from "../../../scripts/app.js";
import { applyEdit, fitEdits, readEdits, strip, writeEdits } from "./tile_edits.js";

const NODES = new Set(["TUDSRExtractTilePrompts", "TUDSRTilePromptsFromStrings"]);
const LONGEST = 5000; // characters that the node takes for one tile
const BLUE = "90, 200, 255";
const AMBER = "255, 190, 60";

const STYLE = `
.tudsr-tiles { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; font: 12px sans-serif;
  color: var(--input-text, #ddd); }
.tudsr-tiles .stage { position: relative; flex: 1 1 auto; min-height: 160px; background: #181818; border-radius: 4px;
  overflow: hidden; outline: none; cursor: crosshair; }
.tudsr-tiles .stage:focus-visible { box-shadow: inset 0 0 0 2px rgb(${BLUE}); }
.tudsr-tiles img, .tudsr-tiles canvas { position: absolute; inset: 0; width: 100%; height: 100%;
  object-fit: contain; pointer-events: none; }
.lg-node-widgets .tudsr-tiles .stage { aspect-ratio: var(--aspect, 1); max-height: 720px; }
.tudsr-tiles .says { min-height: 30px; max-height: 46px; overflow: hidden; line-height: 15px; }
.tudsr-tiles .row { display: flex; gap: 4px; align-items: center; }
.tudsr-tiles .row .grow { flex: 1; }
.tudsr-tiles textarea { box-sizing: border-box; width: 100%; height: 48px; flex: none; resize: none; padding: 4px;
  background: var(--comfy-input-bg, #222); color: inherit; border: 1px solid var(--border-color, #444);
  border-radius: 4px; font: inherit; }
.tudsr-tiles button { padding: 2px 8px; border: 1px solid var(--border-color, #444); border-radius: 4px;
  background: var(--comfy-input-bg, #222); color: inherit; font: inherit; cursor: pointer; }
.tudsr-tiles button.on { border-color: rgb(${AMBER}); color: rgb(${AMBER}); }
.tudsr-tiles :disabled { opacity: 0.45; cursor: default; }
`;

/** Borders of the cells in which a point belongs to the tile whose middle is nearest. */
function cellBorders(boxes, low, high) {
    const middles = [...new Set(boxes.map((box) => (box[low] + box[high]) / 2))].sort((a, b) => a - b);
    return [0, ...middles.slice(1).map((middle, i) => (middle + middles[i]) / 2), 1];
}

function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text) element.textContent = text;
    return element;
}

/** What the frontend files the node's output under; inside a subgraph that is the subgraph's and the node's id. */
function locatorOf(node) {
    return node.graph?.isRootGraph === false ? `${node.graph.id}:${node.id}` : String(node.id);
}

/** The node's id in a queued prompt: inside a subgraph it follows those of the nodes that hold it. */
function executionIdOf(node) {
    return app.extensionManager.workflow.nodeLocatorIdToNodeExecutionId(locatorOf(node));
}

/** What runs have told of the nodes of a workflow: an undo can bring back a record of outputs that lacks the last. */
const told = new WeakMap();

function factsOf(node) {
    const outputs = app.nodeOutputs?.[locatorOf(node)] ?? app.nodeOutputs?.[executionIdOf(node)];
    const facts = outputs?.tudsr_tiles?.[0] ?? null;
    const workflow = app.extensionManager.workflow.activeWorkflow;
    if (!workflow) return facts;
    if (!told.has(workflow)) told.set(workflow, new Map());
    if (facts) told.get(workflow).set(locatorOf(node), facts);
    return told.get(workflow).get(locatorOf(node)) ?? null;
}

class TileEditor {
    constructor(node) {
        this.node = node;
        this.facts = null;
        this.edits = new Map();
        this.hovered = this.selected = null;
        this.kind = "replace";
        this.seen = [];
        this.build();
        this.update();
    }

    build() {
        this.root = make("div", "tudsr-tiles");
        this.stage = make("div", "stage");
        this.stage.tabIndex = 0;
        this.stage.setAttribute("aria-label", "tiles of the picture; arrow keys choose one");
        this.image = make("img");
        this.image.draggable = false;
        this.image.addEventListener("load", () => this.pictured(true));
        this.image.addEventListener("error", () => this.pictured(false));
        this.canvas = make("canvas");
        this.stage.append(this.image, this.canvas);
        this.says = make("div", "says");
        this.box = make("textarea");
        this.box.placeholder = "click a tile to change what it says";
        this.box.maxLength = LONGEST;
        this.buttons = {};
        const row = make("div", "row");
        for (const [name, label, title] of [
            ["replace", "Say", "The tile says this instead of what was extracted"],
            ["add", "Add", "The tile says this too"],
            ["clear", "Clear", "The tile says nothing of its own; the shared words remain"],
            ["restore", "Restore", "The tile says what was extracted"],
            ["extract", "Extract", "Run this node, to see the tiles"],
        ]) {
            const button = make("button", "", label);
            button.type = "button";
            button.title = title;
            button.dataset.action = name;
            button.addEventListener("click", () => this.press(name));
            this.buttons[name] = button;
            if (name === "extract") row.append(make("span", "grow"));
            row.append(button);
        }
        this.root.append(this.stage, this.says, this.box, row);
        this.stage.addEventListener("pointermove", (event) => this.hover(this.tileAt(event)));
        this.stage.addEventListener("pointerleave", () => this.hover(null));
        // Nodes drawn by Vue would be dragged; the middle button still moves the canvas.
        for (const type of ["pointerdown", "pointermove", "pointerup"])
            this.root.addEventListener(type, (event) => event.button === 1 || event.buttons & 4 || event.stopPropagation());
        this.stage.addEventListener("click", (event) => {
            const tile = this.tileAt(event);
            this.select(tile);
            if (tile !== null) this.box.focus();
        });
        this.stage.addEventListener("keydown", (event) => this.walk(event));
        this.box.addEventListener("input", () => this.type());
        this.box.addEventListener("change", () => this.remember());
        // The canvas must not take Delete or Ctrl+V for itself; Ctrl+Enter still runs the workflow.
        this.box.addEventListener("keydown", (event) => event.ctrlKey && event.key === "Enter" || event.stopPropagation());
        new ResizeObserver(() => this.draw()).observe(this.stage);
    }

    /** Follow what is true now; called before every frame, as no event tells all of it in every frontend. */
    sync() {
        if (!this.root.isConnected) {
            // After an undo, Vue still shows the element of the node that was there before.
            const stale = document.querySelector(`[data-node-id="${this.node.id}"] .tudsr-tiles`);
            stale?.replaceWith(this.root);
        }
        const facts = factsOf(this.node);
        const now = [facts, this.locked ? facts?.edits : this.widget.value, this.locked];
        if (now.every((one, i) => one === this.seen[i])) return;
        if (facts !== this.facts) this.show(facts);
        this.seen = now;
        this.edits = facts ? fitEdits(readEdits(now[1]), facts.header) : new Map();
        this.update();
    }

    /** Take what a run of the node has told, or null. */
    show(facts) {
        this.facts = facts;
        if (!(this.selected < facts?.boxes.length)) this.selected = null;
        this.hovered = null;
        this.gone = false;
        this.rows = cellBorders(facts?.boxes ?? [], 1, 3);
        this.columns = cellBorders(facts?.boxes ?? [], 0, 2);
        this.stage.style.setProperty("--aspect", facts?.aspect ?? 1);
        this.image.style.visibility = "hidden";
        if (facts?.picture) this.image.src = app.api.apiURL(`/view?${new URLSearchParams(facts.picture)}`);
        else this.image.removeAttribute("src");
    }

    /** The picture has come, or the server no longer has it. */
    pictured(here) {
        this.gone = !here;
        this.image.style.visibility = here ? "visible" : "hidden";
        this.tell();
    }

    get widget() {
        return this.node.widgets.find((one) => one.name === "edits");
    }

    get locked() {
        return Boolean(this.node.inputs?.some((input) => input.widget?.name === "edits" && input.link != null));
    }

    shown(tile) {
        return applyEdit(this.facts.found[tile], this.edits.get(tile));
    }

    /** The picture's place in the stage, in CSS pixels. */
    frame() {
        const [width, height] = [this.stage.clientWidth, this.stage.clientHeight];
        const aspect = this.facts?.aspect ?? 1;
        const [w, h] = width / height > aspect ? [height * aspect, height] : [width, width / aspect];
        return { x: (width - w) / 2, y: (height - h) / 2, w, h };
    }

    tileAt(event) {
        if (!this.facts) return null;
        const frame = this.frame();
        const [x, y] = [(event.offsetX - frame.x) / frame.w, (event.offsetY - frame.y) / frame.h];
        if (x < 0 || y < 0 || x >= 1 || y >= 1) return null;
        const cell = (borders, value) => borders.findLastIndex((border) => border <= value);
        return cell(this.rows, y) * (this.columns.length - 1) + cell(this.columns, x);
    }

    hover(tile) {
        if (tile === this.hovered) return;
        this.hovered = tile;
        this.tell();
        this.draw();
    }

    select(tile) {
        this.selected = tile;
        this.kind = this.edits.get(tile)?.kind === "add" ? "add" : "replace";
        this.update();
    }

    walk(event) {
        const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
        if (!this.facts || (!step && event.key !== "Enter")) return;
        event.preventDefault();
        event.stopPropagation();
        if (!step) return this.box.focus();
        const width = this.columns.length - 1;
        const [row, column] = [Math.floor((this.selected ?? 0) / width), (this.selected ?? 0) % width];
        const inside = (value, borders) => Math.max(0, Math.min(borders.length - 2, value));
        const first = this.selected === null;
        this.select(first ? 0 : inside(row + step[0], this.rows) * width + inside(column + step[1], this.columns));
    }

    press(action) {
        if (action === "extract") return app.queuePrompt(0, 1, [executionIdOf(this.node)]);
        if (this.selected === null || this.locked) return;
        if (action === "clear") this.change({ kind: "clear", text: "" });
        else if (action === "restore") this.change(null);
        else {
            this.kind = action;
            this.update();
            this.box.focus();
        }
    }

    type() {
        // Ctrl+Z on the canvas undoes in the box too, though nobody is in it; the frontend's undo is the one meant.
        if (document.activeElement !== this.box) return this.update();
        if (this.selected === null || this.locked) return;
        const text = this.box.value;
        const asFound = this.kind === "replace" && strip(text) === this.facts.found[this.selected];
        if (strip(text.replace(/[\r\n]/g, " "))) this.change(asFound ? null : { kind: this.kind, text }, true);
        else this.change(this.kind === "add" ? null : { kind: "clear", text: "" }, true);
    }

    /** Set or remove the edit of the selected tile, in the widget's text; its other lines stay. */
    change(edit, typing = false) {
        const { others } = readEdits(this.widget.value);
        const byTile = new Map(this.edits);
        if (edit) byTile.set(this.selected, edit);
        else byTile.delete(this.selected);
        this.widget.value = writeEdits({ byTile, header: this.facts.header, others });
        this.node.graph?.setDirtyCanvas(true, true);
        this.typing = typing;
        this.sync();
        this.typing = false;
        if (typing) return;
        this.select(this.selected);
        this.remember();
    }

    /** Let the change be one step of undo. */
    remember() {
        app.extensionManager.workflow.activeWorkflow?.changeTracker?.checkState();
    }

    update() {
        const edit = this.edits.get(this.selected);
        const none = this.selected === null || !this.facts;
        this.box.disabled = none || this.locked;
        const added = edit?.kind === "add" ? edit.text : "";
        const says = none ? "" : this.kind === "add" ? added : this.shown(this.selected);
        // What is being typed keeps its blanks, and its cursor.
        if (!this.typing && this.box.value !== says) this.box.value = says;
        this.refresh();
    }

    refresh() {
        const edit = this.edits.get(this.selected);
        for (const [name, button] of Object.entries(this.buttons)) {
            if (name !== "extract") button.disabled = this.box.disabled;
            button.classList.toggle("on", name === this.kind && !this.box.disabled);
        }
        this.buttons.clear.classList.toggle("on", edit?.kind === "clear");
        this.buttons.restore.disabled ||= !edit;
        this.tell();
        this.draw();
    }

    /** Say in words what the tile under the cursor, or else the selected one, shows. */
    tell() {
        const tile = this.hovered ?? this.selected;
        if (!this.facts) this.says.textContent = "Run once, or press Extract, to see the tiles and what they say.";
        else if (this.locked) this.says.textContent = "The edits come from a connected node; disconnect it to edit here.";
        else if (tile === null && this.gone)
            this.says.textContent = "The server no longer has the picture; press Extract to see it again.";
        else if (tile === null) this.says.textContent = "Point at a tile to read it, click to change it.";
        else {
            const edited = this.edits.has(tile) ? " (edited)" : "";
            this.says.textContent = `${tile + 1}${edited}: ${this.shown(tile) || "— only the shared words —"}`;
        }
    }

    draw() {
        const ratio = window.devicePixelRatio || 1;
        const [width, height] = [this.stage.clientWidth, this.stage.clientHeight];
        this.canvas.width = width * ratio;
        this.canvas.height = height * ratio;
        const pen = this.canvas.getContext("2d");
        if (!this.facts || !width || !pen) return;
        pen.scale(ratio, ratio);
        const frame = this.frame();
        const place = ([x0, y0, x1, y1]) => [
            frame.x + x0 * frame.w, frame.y + y0 * frame.h, (x1 - x0) * frame.w, (y1 - y0) * frame.h,
        ];
        const across = this.columns.length - 1;
        const small = Math.min(frame.w / across, frame.h / (this.rows.length - 1)) < 22;
        pen.font = "11px sans-serif";
        for (let tile = 0; tile < this.facts.boxes.length; tile++) {
            const [row, column] = [Math.floor(tile / across), tile % across];
            const cell = [this.columns[column], this.rows[row], this.columns[column + 1], this.rows[row + 1]];
            const [x, y, w, h] = place(cell);
            const edited = this.edits.has(tile);
            if (edited) {
                pen.fillStyle = `rgba(${AMBER}, 0.25)`;
                pen.fillRect(x, y, w, h);
            }
            pen.setLineDash(this.shown(tile) ? [] : [3, 3]);
            pen.strokeStyle = `rgba(${edited ? AMBER : BLUE}, 0.75)`;
            pen.lineWidth = 1;
            pen.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
            if (small) continue;
            pen.lineWidth = 3;
            pen.setLineDash([]);
            pen.strokeStyle = "rgba(0, 0, 0, 0.8)";
            pen.strokeText(tile + 1, x + 4, y + 13);
            pen.fillStyle = "#fff";
            pen.fillText(tile + 1, x + 4, y + 13);
        }
        for (const [tile, color, line] of [[this.hovered, "255, 255, 255", 1.5], [this.selected, AMBER, 2.5]]) {
            if (tile === null) continue;
            const [x, y, w, h] = place(this.facts.boxes[tile]);
            pen.fillStyle = `rgba(${color}, 0.1)`;
            pen.fillRect(x, y, w, h);
            pen.strokeStyle = `rgb(${color})`;
            pen.lineWidth = line;
            pen.setLineDash([]);
            pen.strokeRect(x + 1, y + 1, w - 2, h - 2);
        }
    }
}

function attach(node) {
    const widget = node.widgets?.find((one) => one.name === "edits");
    if (!widget || !node.addDOMWidget) return;
    const editor = new TileEditor(node);
    node.addDOMWidget("tiles", "TUDSR_TILES", editor.root, {
        serialize: false,
        hideOnZoom: false,
        getMinHeight: () => 330,
        getValue: () => "",
        setValue: () => {},
    }).serialize = false;
    Object.assign(widget.options ?? {}, { getMinHeight: () => 50, getMaxHeight: () => 70 });
    node.tudsrEditor = editor;
    node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], 720)]);
}

let loaded = false; // and nothing clicked since
let pressed = false; // in this frame

/**
 * Take the places and sizes that nodes have now into the state of the last step of undo.
 *
 * Vue nodes come back from an undo some pixels larger. The frontend would find that at the next click, or when
 * Ctrl+Z is up again before its frame, take it for a step of its own, which Ctrl+Z then undoes without any effect
 * to see, and forget what to redo.
 */
function settle() {
    const state = app.extensionManager.workflow.activeWorkflow?.changeTracker?.activeState;
    const graph = app.canvas?.graph;
    if (!loaded || !graph?._nodes.some((node) => node.tudsrEditor)) return;
    const inside = state?.definitions?.subgraphs?.find((one) => one.id === graph.id);
    for (const saved of (graph.isRootGraph ? state : inside)?.nodes ?? []) {
        const node = graph.getNodeById(saved.id);
        if (node) Object.assign(saved, { pos: [...node.pos], size: [...node.size] });
    }
}

app.registerExtension({
    name: "TUDSR.TilePrompts",
    setup() {
        const listen = (type, listener) => window.addEventListener(type, listener, true);
        listen("pointerdown", () => {
            settle();
            loaded = false;
        });
        listen("keydown", () => {
            pressed = true;
            requestAnimationFrame(() => { pressed = false });
        });
        listen("keyup", () => pressed && settle());
        document.head.append(make("style", "", STYLE));
        const frame = () => {
            requestAnimationFrame(frame);
            for (const node of app.canvas?.graph?._nodes ?? []) node.tudsrEditor?.sync();
        };
        frame();
    },
    nodeCreated(node) {
        if (NODES.has(node.comfyClass)) attach(node);
    },
    afterConfigureGraph() {
        loaded = true;
    },
});
