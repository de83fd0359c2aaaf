"use strict";
// What colors and names mean, which kinds are shown, and in which order.
(() => {
  const { page } = window.polyhead;
  const color = page.byId("color");
  const order = page.byId("order");

  // A kind as it looks on a map, drawn in a square of 12: a path, filled or a line.
  const SHAPES = {
    induction: ["M1 6.5 L6.5 12"],
    "previous token": ["M0.5 1.5 L11 12"],
    sink: ["M1 1 L1 12"],
    local: ["M0.5 1.5 L11 12", "M0.5 3.5 L9 12", "M0.5 5.5 L7 12"],
    "multiple sinks": ["M1 1 L1 12", "M4 4.5 L4 12", "M8 8.5 L8 12"],
    other: ["M4 5.5 L6 7.5", "M2 8.5 L3.5 10", "M7.5 9.5 L9.5 11.5"],
  };
  const picture = (kind) => {
    const space = "http://www.w3.org/2000/svg";
    const made = (tag, attributes) => {
      const element = document.createElementNS(space, tag);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      return element;
    };
    const svg = made("svg", { viewBox: "-1 -1 14 14", "aria-hidden": "true", class: "picture" });
    svg.append(made("path", { d: "M0 0 L12 12 L0 12 Z", class: "seen" }));
    for (const d of SHAPES[kind] ?? []) svg.append(made("path", { d, class: "stroke" }));
    svg.style.setProperty("--kind", page.kindColor(kind));
    return svg;
  };

  page.kindChip = (kind) => page.element("span", { className: "kind" }, picture(kind), kind);

  page.rangeOf = (name) => {
    const values = window.polyhead.data.numbers[name].filter((value) => value !== null);
    return { least: Math.min(...values), most: Math.max(...values) };
  };

  const kinds = () => {
    const { data } = window.polyhead;
    const items = Object.entries(data.legend.kinds).map(([kind, says]) => {
      const count = data.kinds.filter((other) => other === kind).length;
      const box = page.element("input", {
        type: "checkbox",
        checked: !page.state.hidden.has(kind),
        disabled: count === 0,
        value: kind,
      });
      box.addEventListener("change", () => {
        const hidden = new Set(page.state.hidden);
        if (box.checked) hidden.delete(kind);
        else hidden.add(kind);
        page.present({ hidden });
        if (page.state.order !== "layer") page.emit("order");
      });
      const name = page.element("b", {}, kind);
      const number = page.element("span", { className: "count" }, String(count));
      const label = page.element("label", {}, box, picture(kind), name, number);
      return page.element("li", {}, label, page.element("span", { className: "says" }, says));
    });
    page.byId("kinds").replaceChildren(...items);
  };

  const options = () => {
    const { legend } = window.polyhead.data;
    for (const [select, first, chosen] of [
      [color, ["kind", "kind"], page.state.color],
      [order, ["layer", "layer"], page.state.order],
    ]) {
      const numbers = Object.keys(legend.numbers).map((name) => [name, page.labelOf(name)]);
      select.replaceChildren(
        ...[first, ...numbers].map(([value, text]) => page.element("option", { value }, text)),
      );
      select.value = chosen;
      if (select.selectedIndex < 0) select.selectedIndex = 0;
    }
  };

  const scale = () => {
    const name = page.state.color;
    const legend = window.polyhead.data.legend.numbers[name];
    page.byId("scale").hidden = !legend;
    if (!legend) return;
    const { least, most } = page.rangeOf(name);
    page.byId("scale-says").textContent = legend.says;
    page.byId("scale-least").textContent = page.amount(name, least);
    page.byId("scale-most").textContent = page.amount(name, most);
    const context = page.byId("scale-ramp").getContext("2d");
    for (let x = 0; x < 256; x++) {
      context.fillStyle = page.rampColor(0.12 + (0.88 * x) / 255);
      context.fillRect(x, 0, 1, 1);
    }
  };

  const meanings = () => {
    const { legend } = window.polyhead.data;
    const entry = (name, text) => [page.element("dt", {}, name), page.element("dd", {}, text)];
    page.byId("kind-meanings").replaceChildren(
      ...Object.entries(legend.kinds).flatMap(([kind, says]) => entry(kind, `${says}.`)),
    );
    const UNITS = { share: "0 to 100 %", tokens: "in tokens", nats: "in nats" };
    page.byId("number-meanings").replaceChildren(
      ...Object.entries(legend.numbers).flatMap(([name, { unit, says }]) =>
        entry(unit in UNITS ? `${page.labelOf(name)}, ${UNITS[unit]}` : page.labelOf(name), says),
      ),
    );
  };

  page.colorBy = (name) => {
    page.present({ color: name });
    color.value = name;
  };
  color.addEventListener("change", () => page.present({ color: color.value }));
  order.addEventListener("change", () => {
    page.present({ order: order.value });
    page.emit("order");
  });
  page.on("data", () => {
    kinds();
    options();
    meanings();
    scale();
  });
  page.on("theme", () => {
    kinds();
    scale();
  });
  page.on("present", scale);
})();
