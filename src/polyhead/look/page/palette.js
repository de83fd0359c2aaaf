"use strict";
// Colors. Scales grow steadily in lightness, so they are read without seeing hue, and on paper.
(() => {
  const { page } = window.polyhead;
  const KINDS = {
    light: ["#c8501e", "#1c6fb8", "#a3a8ae", "#1f8a6d", "#7d6a55", "#b184c4"],
    dark: ["#f08a5d", "#63a9ec", "#6d747d", "#4fc3a1", "#b39c82", "#b79ad0"],
  };
  // From nothing, which is the paper, to all weight.
  const SCALES = {
    light: ["#ffffff", "#e3f0e4", "#b5dcd0", "#74bfc4", "#3a94bd", "#2766a8", "#233c86", "#1a1a50"],
    dark: ["#1b1e24", "#33306e", "#375394", "#2f7a8e", "#2fa386", "#6fc761", "#c5de3f", "#fff6a0"],
  };
  // Where a token looks, and who looks at it; the two heads of a comparison.
  const HUES = { light: [[38, 103, 190], [214, 118, 22]], dark: [[84, 148, 240], [232, 148, 62]] };
  // The same as words, which need more contrast than a surface does.
  const INKS = { light: [[38, 103, 190], [160, 82, 8]], dark: HUES.dark };
  // The strongest tint on which a token can still be read, by WCAG's 4.5:1.
  const STRONGEST = { light: [0.7, 0.8], dark: [0.6, 0.52] };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const forced = matchMedia("(forced-colors: active)");
  const root = document.documentElement;

  // Paper is light. Where the system forces its colors, ours go with its background.
  page.theme = () => {
    if (page.paper) return "light";
    const chosen = forced.matches ? undefined : root.dataset.theme;
    return chosen ?? (system.matches ? "dark" : "light");
  };

  const parts = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

  const tables = {};
  // 256 colors, 3 bytes each.
  page.ramp = () => {
    const theme = page.theme();
    if (tables[theme]) return tables[theme];
    const stops = SCALES[theme].map(parts);
    const table = new Uint8Array(3 * 256);
    for (let i = 0; i < 256; i++) {
      const at = (i / 255) * (stops.length - 1);
      const below = Math.min(Math.floor(at), stops.length - 2);
      for (let c = 0; c < 3; c++) {
        const [from, to] = [stops[below][c], stops[below + 1][c]];
        table[3 * i + c] = Math.round(from + (to - from) * (at - below));
      }
    }
    return (tables[theme] = table);
  };

  page.rampColor = (share) => {
    const at = 3 * Math.round(255 * Math.min(1, Math.max(0, share)));
    return `rgb(${page.ramp().slice(at, at + 3).join(" ")})`;
  };

  page.kindColor = (kind) => {
    const at = Object.keys(window.polyhead.data.legend.kinds).indexOf(kind);
    return KINDS[page.theme()][at];
  };

  // The background of a token that has this much weight.
  page.tint = (which, weight) => {
    const strength = STRONGEST[page.theme()][which] * Math.sqrt(Math.min(1, weight));
    return `rgb(${HUES[page.theme()][which].join(" ")} / ${strength.toFixed(3)})`;
  };

  page.ink = (which) => `rgb(${INKS[page.theme()][which].join(" ")})`;

  page.hue = (which) => `rgb(${HUES[page.theme()][which].join(" ")})`;

  // The weight of a cell as the eye shall see it, 0 to 1: the root lifts what is weak.
  page.brightness = (share) => Math.pow(share, 0.42);

  const button = page.byId("theme");
  const name = () => {
    button.textContent = page.theme() === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", `${button.textContent} colors`);
  };
  const remember = (theme) => {
    try {
      localStorage.setItem("polyhead-theme", theme);
    } catch {
      // A page in a frame may have no storage; then the choice lasts as long as the page.
    }
  };
  try {
    const before = localStorage.getItem("polyhead-theme");
    if (before === "light" || before === "dark") root.dataset.theme = before;
  } catch {
    // As above.
  }
  button.addEventListener("click", () => {
    root.dataset.theme = page.theme() === "dark" ? "light" : "dark";
    remember(root.dataset.theme);
    name();
    page.emit("theme");
  });
  for (const setting of [system, forced]) {
    setting.addEventListener("change", () => {
      name();
      page.emit("theme");
    });
  }
  name();
})();
