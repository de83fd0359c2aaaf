"use strict";
// The numbers of the chosen head, each beside where it stands among all heads.
(() => {
  const { page } = window.polyhead;
  const table = page.byId("numbers");
  const WIDTH = 110;
  const HEIGHT = 16;

  // A tick a head, the chosen ones longer: shares from 0 to 1, the rest from least to most.
  const strip = (name, places) => {
    const { data } = window.polyhead;
    const { least, most } = page.rangeOf(name);
    const share = data.legend.numbers[name].unit === "share";
    const [from, to] = share ? [0, 1] : [least, most];
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    const canvas = page.element("canvas", { "aria-hidden": "true", width: WIDTH * ratio, height: HEIGHT * ratio });
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const at = (value) => 1.5 + ((WIDTH - 3) * (value - from)) / (to - from || 1);
    context.fillStyle = page.theme() === "dark" ? "#ffffff2e" : "#0000001f";
    for (const value of data.numbers[name]) {
      if (value !== null) context.fillRect(at(value) - 0.5, 5, 1, 6);
    }
    places.forEach((place, which) => {
      const value = page.numberOf(name, place);
      if (value === null) return;
      context.fillStyle = page.hue(which);
      context.fillRect(at(value) - 1.5, 0, 3, HEIGHT);
    });
    return canvas;
  };

  const rank = (name, place) => {
    const { data } = window.polyhead;
    const own = page.numberOf(name, place);
    const higher = data.numbers[name].filter((value) => value !== null && value > own).length;
    return own === null ? "" : `rank ${higher + 1} of ${data.heads.length} heads`;
  };

  const build = () => {
    const { data } = window.polyhead;
    const { head, other } = page.state;
    const places = other === null ? [head] : [head, other];
    const caption = page.element("caption", { className: "unseen" }, "Numbers of the head, means over the text");
    const values = (made) =>
      places.map((place, which) => {
        const cell = made(place);
        if (other !== null) cell.style.color = page.ink(which);
        return cell;
      });
    const heading = (words, first) =>
      page.element(
        "tr",
        {},
        page.element("th", { scope: "rowgroup", className: "group" }, words),
        page.element("td", { className: "strip group" }, first ? "among all heads" : ""),
        ...values((place) => page.element(first ? "th" : "td", { className: "value group" }, first ? page.shortName(place) : "")),
      );
    const row = (name) => {
      const { label, says } = data.legend.numbers[name];
      const button = page.element("button", { type: "button", title: `${says} Click to color the frames by it.` }, label);
      button.setAttribute("aria-pressed", String(page.state.color === name));
      button.setAttribute("aria-label", `Color by ${page.labelOf(name)}`);
      button.addEventListener("click", () =>
        page.colorBy(page.state.color === name ? "kind" : name),
      );
      return page.element(
        "tr",
        {},
        page.element("th", { scope: "row" }, button),
        page.element("td", { className: "strip" }, strip(name, places)),
        ...values((place) =>
          page.element("td", { className: "value", title: rank(name, place) }, page.amount(name, page.numberOf(name, place))),
        ),
      );
    };
    const named = (share) =>
      Object.keys(data.numbers).filter((name) => (data.legend.numbers[name].unit === "share") === share);
    table.replaceChildren(
      caption,
      page.element("tbody", {}, heading("weight on", true), ...named(true).map(row)),
      page.element("tbody", {}, heading("spread, reach, size", false), ...named(false).map(row)),
    );
  };

  let built = "";
  const rebuild = () => {
    const { head, other, color } = page.state;
    const now = `${head} ${other} ${color}`;
    if (now === built) return; // another token changes none of it
    built = now;
    build();
  };
  page.on("data", () => (built = ""));
  page.on("theme", build);
  page.on("select", rebuild);
  page.on("present", rebuild);
})();
