// The pack's page of ComfyUI's settings: what new upscaling nodes start with, and previews.
//
// Only a node that someone adds takes the defaults: one that a workflow, a copy, an undo or a
// blueprint brings has values of its own. Previews are switched in nodes/host/settings.py.

import { app } from "../../../scripts/app.js";

const TILE = "TUDSR.Upscaling.Tile";
const COLOR_FIX = "TUDSR.Upscaling.ColorFix";
const STEP = 64; // pixels, of the widget
const WIDGETS = new Map([
    ["tile", TILE],
    ["color_fix", COLOR_FIX],
]);
const NODES = new Set(["TUDSRUpscale", "TUDSRStageOne", "TUDSRStageTwo", "TUDSRUpscaleFolder", "TUDSRPlan"]);

const SETTINGS = [
    {
        id: TILE,
        category: ["TUDSR", "Upscaling", "Tile"],
        name: "Tile of new upscaling nodes (pixels)",
        tooltip:
            "Side of a tile that newly added upscaling nodes start with, in steps of 64. " +
            "0: chosen for each picture. Nodes of saved workflows keep theirs.",
        type: "number",
        attrs: { min: 0, max: 4096, step: STEP, showButtons: true },
        defaultValue: 0,
        sortOrder: 30,
    },
    {
        id: COLOR_FIX,
        category: ["TUDSR", "Upscaling", "ColorFix"],
        name: "Colour fix of new upscaling nodes",
        tooltip: "What newly added upscaling nodes start with. Nodes of saved workflows keep theirs.",
        type: "combo",
        options: ["wavelet"], // as the node has them, once it is known
        defaultValue: "wavelet",
        sortOrder: 20,
    },
    {
        id: "TUDSR.Upscaling.Previews",
        category: ["TUDSR", "Upscaling", "Previews"],
        name: "Previews while upscaling",
        tooltip:
            "Show the picture on upscaling nodes while it is computed, where ComfyUI's own previews are on. " +
            "Counts from the next run. A server with several users always shows them.",
        type: "boolean",
        defaultValue: true,
        sortOrder: 10,
    },
];

let loading = 0;

/** What is read from the API form of a graph is made without the frontend saying so: its values are set afterwards. */
function noticeApiGraphs() {
    const { loadApiJson } = app;
    app.loadApiJson = async function (...args) {
        loading += 1;
        try {
            return await loadApiJson.apply(this, args);
        } finally {
            loading -= 1;
        }
    };
}

/** The value of a setting that `widget` can have, or the one it has. */
function chosen(widget) {
    const value = app.extensionManager.setting.get(WIDGETS.get(widget.name));
    if (widget.name === "tile") {
        return Number.isFinite(value) ? Math.min(4096, Math.max(0, Math.round(value / STEP) * STEP)) : widget.value;
    }
    return widget.options.values.includes(value) ? value : widget.value;
}

app.registerExtension({
    name: "TUDSR.Settings",
    settings: SETTINGS,
    init: noticeApiGraphs,
    addCustomNodeDefs(defs) {
        const { input } = defs.TUDSRUpscale ?? {};
        const [kind, options] = input?.required?.color_fix ?? [];
        const known = Array.isArray(kind) ? kind : options?.options;
        if (known) SETTINGS[1].options.splice(0, Infinity, ...known);
    },
    nodeCreated(node) {
        if (!NODES.has(node.comfyClass) || app.configuringGraph || loading) return;
        const own = node.widgets.filter((widget) => WIDGETS.has(widget.name)).map((widget) => [widget, widget.value]);
        for (const [widget] of own) widget.value = chosen(widget);
        const { configure } = node;
        node.configure = function (info) {
            node.configure = configure;
            if (info.widgets_values) for (const [widget, value] of own) widget.value = value;
            return configure.call(this, info);
        };
    },
});
