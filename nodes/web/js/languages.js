// The pack's words in a language that the frontend itself does not have, such as German.
//
// Frontends take the words that /i18n serves; newer ones (1.35) only those of their own languages. A browser in
// another language shows the frontend in English, and these nodes, their tooltips and their settings in its own.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

/** The frontend's own vue-i18n, or undefined where it is kept elsewhere. */
function translator() {
    const vue = document.getElementById("vue-app")?.__vue_app__;
    return vue?._context?.provides?.[vue.__VUE_I18N_SYMBOL__]?.global;
}

/** The browser's language where English is shown but nobody chose it: so do later frontends (1.49) what they lack. */
async function wantedLanguage(shown) {
    if (shown !== "en") return shown;
    const chosen = await api.getSetting("Comfy.Locale").catch(() => shown);
    return chosen ?? navigator.language.split("-")[0];
}

app.registerExtension({
    name: "TUDSR.Languages",
    async init() {
        const [i18n, shown] = [translator(), app.extensionManager.setting.get("Comfy.Locale")];
        const wanted = await wantedLanguage(shown);
        if (!i18n?.mergeLocaleMessage) return;
        if (shown === wanted && i18n.te("nodeDefs.TUDSRUpscale.display_name", shown)) return;
        const served = await api.fetchApi("/i18n");
        const words = served.ok && (await served.json())[wanted];
        if (!words?.nodeDefs?.TUDSRUpscale) return;
        const { nodeDefs, settings, settingsCategories } = words;
        i18n.mergeLocaleMessage(shown, { nodeDefs, settings, settingsCategories });
    },
});
