// Two pictures over one another: a divider to move, one zoom for both, and their difference made visible.
//
// Used by the page of `tudsr compare` and by the Compare node.

const CSS = `
.compare-view { position: relative; overflow: hidden; background: #1c1c1c; color: #eee; user-select: none;
  font: 13px/1.3 system-ui, sans-serif; touch-action: none; outline-offset: -2px }
.compare-view .pane { position: absolute; inset: 0; overflow: hidden }
.compare-view img { position: absolute; left: 0; top: 0; max-width: none; transform-origin: 0 0; pointer-events: none }
.compare-view .divider { position: absolute; top: 0; bottom: 0; width: 25px; margin-left: -12px; cursor: ew-resize }
.compare-view .divider::after { content: ""; position: absolute; left: 12px; top: 0; bottom: 0; width: 1px;
  background: #fff; box-shadow: 0 0 3px #000 }
.compare-view .divider::before { content: "\\2194"; position: absolute; left: 0; top: 50%; width: 25px; height: 25px;
  margin-top: -12px; border-radius: 50%; background: #fffd; color: #111; text-align: center; line-height: 25px; z-index: 1 }
.compare-view .name { position: absolute; top: 8px; padding: 2px 8px; border-radius: 9px; background: #000a;
  max-width: 45%; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; pointer-events: none }
.compare-view .bar { position: absolute; bottom: 8px; left: 8px; display: flex; gap: 6px; align-items: center }
.compare-view button { font: inherit; color: inherit; background: #000a; border: 1px solid #fff4; border-radius: 9px;
  padding: 2px 10px; cursor: pointer }
.compare-view button[aria-pressed=true] { background: #e8e8e8; color: #111 }
.compare-view.differs .divider, .compare-view.differs .name { display: none }
.compare-view.empty > :not(.pane) { display: none }
.compare-view.differs .first { mix-blend-mode: difference }
`;
const GAINS = [1, 4, 16];

/**
 * Fill `host` with a view of two pictures and return `show(first, second)`, each `{ src, name }`, which changes them.
 * The second gives the size; the first is shown as large.
 */
export function compareView(host) {
    const make = (kind, parent, classes) => {
        const element = document.createElement(kind);
        element.className = classes ?? "";
        return parent.appendChild(element);
    };
    if (!document.getElementById("compare-view-style")) {
        const style = make("style", document.head);
        style.id = "compare-view-style";
        style.textContent = CSS;
    }
    host.classList.add("compare-view", "empty");
    host.tabIndex = 0;
    const pictures = make("div", host, "pane");
    const second = make("img", make("div", pictures, "pane second"));
    const first = make("img", make("div", pictures, "pane first"));
    const divider = make("div", host, "divider");
    divider.setAttribute("role", "slider");
    divider.setAttribute("aria-label", "divider");
    const names = [make("div", host, "name"), make("div", host, "name")];
    names[0].style.left = names[1].style.right = "8px";
    const bar = make("div", host, "bar");
    const button = (text, title, act) => {
        const made = make("button", bar);
        Object.assign(made, { type: "button", textContent: text, title, onclick: act });
        return made;
    };

    let [split, zoom, x, y, gain] = [0.5, 0, 0, 0, 0];
    const fitting = () => Math.min(host.clientWidth / second.naturalWidth, host.clientHeight / second.naturalHeight);

    function draw() {
        if (!second.naturalWidth || !host.clientWidth) return;
        host.classList.remove("empty");
        const scale = zoom || fitting();
        const [width, height] = [second.naturalWidth * scale, second.naturalHeight * scale];
        const place = (at, size, room) => (size <= room ? (room - size) / 2 : Math.min(0, Math.max(room - size, at)));
        [x, y] = [place(x, width, host.clientWidth), place(y, height, host.clientHeight)];
        for (const image of [first, second]) {
            Object.assign(image.style, { width: `${width}px`, height: `${height}px` });
            image.style.transform = `translate(${x}px, ${y}px)`;
            image.style.imageRendering = scale > 2 && !gain ? "pixelated" : "auto";
        }
        const edge = split * host.clientWidth;
        first.parentElement.style.clipPath = gain ? "none" : `inset(0 ${host.clientWidth - edge}px 0 0)`;
        divider.style.left = `${edge}px`;
        divider.setAttribute("aria-valuenow", Math.round(split * 100));
        host.classList.toggle("differs", gain > 0);
        pictures.style.filter = gain ? `brightness(${gain})` : "";
        size.textContent = `${Math.round(scale * 100)} %`;
    }

    function zoomTo(wanted, px = host.clientWidth / 2, py = host.clientHeight / 2) {
        const before = zoom || fitting();
        const after = Math.min(32, wanted);
        [x, y] = [px - ((px - x) * after) / before, py - ((py - y) * after) / before];
        zoom = after <= fitting() ? 0 : after;
        draw();
    }

    const size = button("", "Fit, or one pixel per pixel", () => zoomTo(zoom === 1 ? fitting() : 1));
    const difference = button("difference", "Show how far the pictures are apart, as they are and amplified", () => {
        gain = gain === GAINS.at(-1) ? 0 : (GAINS[GAINS.indexOf(gain) + 1]);
        difference.textContent = gain ? `difference x${gain}` : "difference";
        difference.setAttribute("aria-pressed", gain > 0);
        draw();
    });

    const follow = (target, move) => {
        target.addEventListener("pointerdown", (event) => {
            if (event.target.closest("button") || event.button) return;
            event.stopPropagation();
            target.setPointerCapture(event.pointerId);
            target.onpointermove = (next) => (move(next), draw());
            target.onpointerup = target.onpointercancel = () => (target.onpointermove = null);
        });
    };
    // Where a canvas is scaled, as ComfyUI's, a pixel of the mouse is another length than one of the page.
    const ratio = () => host.getBoundingClientRect().width / host.clientWidth || 1;
    follow(divider, (event) => {
        const box = host.getBoundingClientRect();
        split = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    });
    follow(pictures, (event) => {
        x += event.movementX / ratio();
        y += event.movementY / ratio();
    });
    host.addEventListener("wheel", (event) => {
        event.preventDefault();
        event.stopPropagation();
        const box = host.getBoundingClientRect();
        const [px, py] = [(event.clientX - box.left) / ratio(), (event.clientY - box.top) / ratio()];
        zoomTo((zoom || fitting()) * 1.2 ** -Math.sign(event.deltaY), px, py);
    }, { passive: false });
    host.addEventListener("dblclick", (event) => event.target.closest("button") || ((zoom = 0), draw()));
    host.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
        if (!step) return;
        event.preventDefault();
        event.stopPropagation();
        split = Math.min(1, Math.max(0, split + step));
        draw();
    });
    second.onload = draw;
    new ResizeObserver(draw).observe(host);
    return (one, other) => {
        [first.src, second.src] = [one.src, other.src];
        [names[0].textContent, names[1].textContent] = [one.name, other.name];
        draw();
    };
}
