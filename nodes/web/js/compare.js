// The view of the Compare node: what its last run gave, with the divider, zoom and difference of the shared view.
//
// Nothing of it is saved in the workflow. It comes back as what nodes say does (node_text.js).

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { compareView } from "../../../tudsr/compare_view.js";
import { place } from "./node_text.js";

const NODE = "TUDSRCompare";
const remembered = (node) => `tudsr:compare:${app.graph.id}:${place(node)}`;

function address({ filename, subfolder, type }) {
    return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder: subfolder ?? "", type })}`);
}

function attach(node) {
    const root = document.createElement("div");
    root.style.cssText = "width: 100%; height: 100%; min-height: 240px; border-radius: 4px";
    const show = compareView(root);
    const widget = node.addDOMWidget("compare", "TUDSR_COMPARE", root, {
        serialize: false,
        hideOnZoom: false,
        getMinHeight: () => 240,
        getValue: () => "",
        setValue: () => {},
    });
    widget.serialize = false;
    node.setSize([Math.max(node.size[0], 420), Math.max(node.size[1], 460)]);
    const next = document.createElement("button");
    next.type = "button";
    next.title = "The next pair of the batch";
    root.querySelector(".bar").append(next);
    let [pairs, at] = [[], 0];
    const draw = () => {
        next.hidden = pairs.length < 2;
        next.textContent = `${at + 1} / ${pairs.length}`;
        if (pairs.length) show(...pairs[at].map(([name, file]) => ({ src: address(file), name })));
    };
    next.onclick = () => ((at = (at + 1) % pairs.length), draw());
    node.tudsrCompare = ({ before, after }) => {
        const count = Math.max(before.length, after.length);
        pairs = [...Array(count).keys()].map((i) => [
            ["before", before[Math.min(i, before.length - 1)]],
            ["after", after[Math.min(i, after.length - 1)]],
        ]);
        at = Math.min(at, count - 1);
        draw();
    };
    draw();
}

app.registerExtension({
    name: "TUDSR.Compare",
    nodeCreated(node) {
        if (node.comfyClass !== NODE || !node.addDOMWidget) return;
        attach(node);
        const { onExecuted } = node;
        node.onExecuted = function (output) {
            onExecuted?.call(this, output);
            if (!output?.before) return;
            this.tudsrCompare(output);
            const { before, after } = output;
            sessionStorage.setItem(remembered(this), JSON.stringify({ before, after }));
        };
    },
    loadedGraphNode(node) {
        if (!node.tudsrCompare) return;
        const last = sessionStorage.getItem(remembered(node));
        const output = app.nodeOutputs?.[place(node)] ?? (last && JSON.parse(last));
        if (output?.before) node.tudsrCompare(output);
    },
    onNodeOutputsUpdated(outputs) {
        for (const [key, output] of Object.entries(outputs ?? {})) {
            const node = app.graph?.nodes?.find((one) => one.tudsrCompare && place(one) === key);
            if (node && output?.before) node.tudsrCompare(output);
        }
    },
});
