// What a node says (nodes/host/messages.py), shown on it: plans, and warnings of the last run.
//
// Nothing of it is saved in the workflow or sent with a run. It comes back after undo and in other
// tabs from the frontend's own record of outputs, and after a reload from the browser's session.

import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const NAME = "says";
const PLANNERS = new Set(["TUDSRPlan", "TUDSRTilePlan"]);
const ours = (node) => node.comfyClass?.startsWith("TUDSR");

/** The name under which frontends keep a node's outputs: its number, after that of its subgraph. */
export function place(node) {
    return node.graph === node.graph?.rootGraph ? `${node.id}` : `${node.graph?.id}:${node.id}`;
}

function remembered(node) {
    return `tudsr:${app.graph.id}:${place(node)}`;
}

/** Find the node of an execution: `5:3` is node 3 in the subgraph of node 5. */
function nodeAt(path) {
    let [graph, node] = [app.graph, null];
    for (const id of `${path}`.split(":")) {
        node = graph?.getNodeById(Number(id)) ?? graph?.getNodeById(id);
        graph = node?.subgraph;
    }
    return node;
}

function textBox(node) {
    const known = node.widgets?.find((widget) => widget.name === NAME);
    if (known) return known;
    const { widget } = ComfyWidgets.STRING(node, NAME, ["STRING", { multiline: true, default: "" }], app);
    widget.serialize = false;
    Object.assign(widget.options, { serialize: false, read_only: true, getMinHeight: () => 96 });
    widget.element.readOnly = true;
    widget.element.placeholder = "";
    const wanted = node.computeSize();
    node.setSize([Math.max(node.size[0], wanted[0]), Math.max(node.size[1], wanted[1])]);
    return widget;
}

function show(node, text) {
    if (!text && !node.widgets?.some((widget) => widget.name === NAME)) return;
    textBox(node).value = text;
    node.graph?.setDirtyCanvas(true, true);
}

/** Read workflows of the time when a seed had a "control after generate" behind it, which moved all later widgets. */
function dropSeedControl(node) {
    const { onConfigure } = node;
    const defaults = new Map(node.widgets?.map((widget) => [widget.name, widget.value]));
    node.onConfigure = function (info) {
        onConfigure?.call(this, info);
        const kept = this.widgets?.filter((widget) => widget.serialize !== false) ?? [];
        const after = kept.findIndex((widget) => widget.name === "seed") + 1;
        const values = info.widgets_values;
        if (!after || !["fixed", "increment", "decrement", "randomize"].includes(values?.[after])) return;
        kept.slice(after).forEach((widget, i) => {
            widget.value = after + 1 + i < values.length ? values[after + 1 + i] : defaults.get(widget.name);
        });
    };
}

let started = false;

app.registerExtension({
    name: "TUDSR.NodeText",
    setup() {
        // A run without words tells nothing at its end, so what the last one said goes when it starts.
        app.api.addEventListener("executing", ({ detail }) => {
            const node = detail && nodeAt(detail);
            if (node && ours(node)) {
                show(node, "");
                sessionStorage.removeItem(remembered(node));
            }
        });
    },
    nodeCreated(node) {
        if (!ours(node)) return;
        dropSeedControl(node);
        if (PLANNERS.has(node.comfyClass)) textBox(node);
        const { onExecuted } = node;
        node.onExecuted = function (output) {
            onExecuted?.call(this, output);
            if (!output?.text?.[0]) return;
            show(this, output.text[0]);
            sessionStorage.setItem(remembered(this), output.text[0]);
        };
    },
    loadedGraphNode(node) {
        if (!ours(node)) return;
        const text = app.nodeOutputs?.[place(node)]?.text?.[0];
        show(node, text ?? (started ? "" : sessionStorage.getItem(remembered(node))) ?? "");
    },
    afterConfigureGraph() {
        started = true;
    },
    onNodeOutputsUpdated(outputs) {
        for (const [key, output] of Object.entries(outputs ?? {})) {
            const node = app.graph?.nodes?.find((one) => ours(one) && place(one) === key);
            if (node && output?.text?.[0]) show(node, output.text[0]);
        }
    },
});
