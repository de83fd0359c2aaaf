"use strict";
// On paper: light colors, and every map and every tint, though never scrolled to.
(() => {
  const { page } = window.polyhead;

  // A page is printed as soon as its listeners are done, so nothing here can wait.
  const turn = (paper) => {
    const before = page.theme();
    page.paper = paper;
    page.emit(page.theme() === before ? "paper" : "theme");
    if (!paper) return;
    const missing = page.drawRead();
    page.byId("undrawn").textContent = missing
      ? `${missing} of ${window.polyhead.data.heads.length} maps are not drawn yet: print again in a few seconds.`
      : "";
  };
  addEventListener("beforeprint", () => window.polyhead.data && turn(true));
  addEventListener("afterprint", () => window.polyhead.data && turn(false));
})();
