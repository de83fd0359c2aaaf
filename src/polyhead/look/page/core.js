"use strict";
// What is chosen on the page, and who wants to know when that changes.
window.polyhead = { data: null };
window.polyhead.page = (() => {
  const listeners = {};
  const page = {
    // head, other: places in data.heads; other is the head compared with, or null.
    state: {
      head: 0,
      other: null,
      comparing: false,
      token: null,
      color: "kind",
      order: "layer",
      hidden: new Set(),
      mode: "both",
    },

    on(event, listener) {
      (listeners[event] ??= []).push(listener);
    },

    emit(event) {
      for (const listener of listeners[event] ?? []) listener();
    },

    // Choose a head, another, a token: those named in `wanted`.
    choose(wanted) {
      const { state } = page;
      const changed = Object.keys(wanted).some((key) => state[key] !== wanted[key]);
      if (!changed) return;
      Object.assign(state, wanted);
      page.emit("select");
      page.announce();
    },

    announce() {
      const detail = window.polyhead.selection();
      document.dispatchEvent(new CustomEvent("polyhead:select", { detail }));
    },

    // Color, order, hidden kinds, mode: how it is shown.
    present(wanted) {
      Object.assign(page.state, wanted);
      page.emit("present");
    },

    place(layer, head) {
      return window.polyhead.data.heads.findIndex(([l, h]) => l === layer && h === head);
    },

    element(tag, properties = {}, ...children) {
      const made = document.createElement(tag);
      for (const [name, value] of Object.entries(properties)) {
        if (name.includes("-") || name === "role") made.setAttribute(name, value);
        else made[name] = value;
      }
      made.append(...children);
      return made;
    },

    byId: (id) => document.getElementById(id),
  };
  return page;
})();

window.polyhead.selection = () => {
  const { data, page } = window.polyhead;
  const named = (place) => {
    const [layer, head] = data.heads[place];
    return { layer, head };
  };
  const { head, other, token } = page.state;
  return { ...named(head), token, other: other === null ? null : named(other) };
};
