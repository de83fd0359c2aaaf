"use strict";
// Numbers, tokens and heads in words.
(() => {
  const { page } = window.polyhead;
  const MARKS = { " ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥" };

  page.share = (value) => {
    if (value >= 0.0995) return `${(100 * value).toFixed(0)} %`;
    if (value >= 0.00095 || value === 0) return `${(100 * value).toFixed(1)} %`;
    return value >= 0.00005 ? `${(100 * value).toFixed(2)} %` : "< 0.01 %";
  };

  // A number of data.numbers with its unit.
  page.amount = (name, value) => {
    if (value === null || value === undefined) return "–";
    const { unit } = window.polyhead.data.legend.numbers[name];
    if (unit === "share") return page.share(value);
    const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
    return unit === "tokens" || unit === "nats"
      ? `${value.toFixed(digits)} ${unit}`
      : value.toFixed(digits);
  };

  page.labelOf = (name) => {
    const { label, unit } = window.polyhead.data.legend.numbers[name];
    return unit === "share" ? `weight on ${label}` : label;
  };

  // What is blank made visible, the rest as it is.
  page.visible = (token) => (token === "" ? "∅" : token.replace(/[\n\r\t]/g, (c) => MARKS[c]));

  // A token within a sentence or on an axis: short, on one line, blanks marked.
  page.quoted = (at, most = 24) => {
    const token = window.polyhead.data.tokens[at] ?? "";
    const inner = token.trim() === "" ? token.replace(/\s/g, (c) => MARKS[c] ?? "␣") : token.trim();
    const letters = [...page.visible(inner)];
    return letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : letters.join("");
  };

  page.headName = (place) => {
    const [layer, head] = window.polyhead.data.heads[place];
    return `Layer ${layer}, head ${head}`;
  };

  page.shortName = (place) => window.polyhead.data.heads[place].join(".");

  page.numberOf = (name, place) => window.polyhead.data.numbers[name]?.[place] ?? null;

  // What the head does, with the number that gave it its name.
  page.sentence = (place) => {
    const of = (name) => page.amount(name, page.numberOf(name, place));
    switch (window.polyhead.data.kinds[place]) {
      case "induction":
        return `Where a token comes again, ${of("mass_induction")} of its weight is on what followed it last time.`;
      case "previous token":
        return `Each token puts ${of("mass_previous")} of its weight on the token just before.`;
      case "sink":
        return `${of("mass_first")} of all weight rests on the first token: it has little to say here.`;
      case "local":
        return `${of("mass_recent")} of the weight is on the last 16 tokens, as spread as over ${of("effective_keys")}.`;
      case "multiple sinks":
        return `${of("mass_sinks")} of all weight rests on four tokens, from wherever it looks.`;
      default:
        return `Its weight is as spread as over ${of("effective_keys")}, on average ${of("mean_distance")} away.`;
    }
  };
})();
