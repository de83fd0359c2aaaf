"use strict";
window.polyhead = (() => {
  const polyhead = { data: null };
  let chosen = { head: 0, token: null };
  polyhead.selection = () => {
    const [layer, head] = polyhead.data.heads[chosen.head];
    return { layer, head, token: chosen.token };
  };
  polyhead.show = (payload) => {
    polyhead.data = payload;
    document.getElementById("page").textContent = payload.heads.length + " heads of " + payload.model;
    document.dispatchEvent(new CustomEvent("polyhead:select", { detail: polyhead.selection() }));
  };
  return polyhead;
})();
