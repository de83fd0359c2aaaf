"use strict";
// The view in the address: #layer=12&head=3&token=5, and &with=18.6 for a comparison.
(() => {
  const { page } = window.polyhead;

  const whole = (text) => (/^\d+$/.test(text ?? "") ? Number(text) : NaN);

  // What the address asks for, as far as this text has it; null if it names no head.
  page.linked = () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    const head = page.place(whole(asked.get("layer")), whole(asked.get("head")));
    if (head < 0) return null;
    const token = whole(asked.get("token"));
    const other = page.place(...(asked.get("with") ?? "").split(".").map(whole));
    return {
      head,
      token: token < window.polyhead.data.tokens.length ? token : null,
      other: other < 0 ? null : other,
      comparing: other >= 0,
    };
  };

  const write = () => {
    const { layer, head, token, other } = window.polyhead.selection();
    let hash = `#layer=${layer}&head=${head}`;
    if (token !== null) hash += `&token=${token}`;
    if (other) hash += `&with=${other.layer}.${other.head}`;
    if (hash === location.hash) return;
    try {
      history.replaceState(null, "", hash);
    } catch {
      // A page in a frame without an address of its own has none to keep.
    }
  };

  page.on("select", write);
  window.addEventListener("hashchange", () => {
    const wanted = page.linked();
    if (wanted) page.choose(wanted);
  });
})();
