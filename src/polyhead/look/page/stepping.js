"use strict";
// Keys and clicks in the text: one token takes the focus, and arrow keys lead to the others.
(() => {
  const { page } = window.polyhead;
  const text = page.byId("text");

  let focusable = null;
  const roving = () => {
    const token = page.state.token ?? 0;
    if (focusable) focusable.tabIndex = -1;
    for (const span of text.querySelectorAll('[aria-selected="true"]')) span.removeAttribute("aria-selected");
    focusable = page.spans()[token];
    if (focusable) focusable.tabIndex = 0;
    if (page.state.token !== null) focusable.setAttribute("aria-selected", "true");
  };

  page.on("select", roving);

  // The token above or below: the nearest of the next line.
  const vertical = (token, down) => {
    const here = page.spans()[token].getBoundingClientRect();
    const x = here.left + here.width / 2;
    let best = token;
    let line = null;
    for (let next = token + down; next >= 0 && next < page.spans().length; next += down) {
      const box = page.spans()[next].getClientRects()[0];
      if (!box || Math.abs(box.top - here.top) < here.height / 2) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > here.height / 2) break;
      const offset = (candidate) => {
        const { left, width } = page.spans()[candidate].getClientRects()[0];
        return Math.abs(left + width / 2 - x);
      };
      if (best === token || offset(next) < offset(best)) best = next;
    }
    return best;
  };

  // Whether the text goes on to the left here: each line has a direction of its own.
  const leftwards = (token) => {
    const [here, next] = [token, token + 1].map((at) => page.spans()[at]?.getClientRects()[0]);
    const [back] = page.spans()[token - 1]?.getClientRects() ?? [];
    if (next && Math.abs(next.top - here.top) < here.height / 2) return next.left < here.left;
    return Boolean(back) && Math.abs(back.top - here.top) < here.height / 2 && here.left < back.left;
  };

  const go = (token) => {
    page.choose({ token: Math.min(page.spans().length - 1, Math.max(0, token)) });
    page.pointAt(null);
    page.reveal(page.state.token);
    page.spans()[page.state.token].focus({ preventScroll: true });
  };

  text.addEventListener("click", (event) => {
    const token = page.tokenOf(event);
    if (token === null) return;
    if (token === page.state.token) page.choose({ token: null });
    else go(token);
  });
  text.addEventListener("keydown", (event) => {
    const token = page.tokenOf(event);
    if (token === null || event.altKey || event.ctrlKey || event.metaKey) return;
    const forward = leftwards(token) ? -1 : 1;
    const steps = {
      ArrowLeft: () => go(token - forward), ArrowRight: () => go(token + forward),
      ArrowUp: () => go(vertical(token, -1)), ArrowDown: () => go(vertical(token, 1)),
      Home: () => go(0), End: () => go(page.spans().length - 1), Enter: () => go(token), " ": () => go(token),
      Escape: () => (page.state.token === null ? page.focusGrid() : page.choose({ token: null })),
    };
    if (!(event.key in steps)) return;
    steps[event.key]();
    event.preventDefault();
  });

  page.focusText = () => go(page.state.token ?? 0);
})();
