"use strict";
// What every step is drawn with: numbers, tables, strips, code. All of it text, escaped.
(() => {
  const P = window.polyhead;
  const { data, times } = P;
  const esc = (text) =>
    String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const num = (v, digits = 3) =>
    v === -Infinity ? "-inf" : Number.isFinite(v) ? v.toFixed(digits).replace(/^-(0\.?0*)$/, "$1") : "?";
  // A difference as a person would say it.
  const gap = (v) => (v === 0 ? "0.0" : v < 1e-3 ? v.toExponential(1) : v.toPrecision(3));
  const token = (t) => esc(P.state.tokens[t]);
  const share = (v, most) => (Number.isFinite(v) && most ? Math.min(1, Math.abs(v) / most) : 0);
  const largest = (values) =>
    [values].flat(Infinity).reduce((m, v) => (Number.isFinite(v) ? Math.max(m, Math.abs(v)) : m), 0);

  // What may be wider than its lane scrolls by itself, with arrow keys too.
  const scroll = (name, html) =>
    `<div class="scroll" role="group" aria-label="${esc(name)}">${html}</div>`;

  // A table of numbers. head(i, j): whose color; pick(i, j): its key if it can be chosen;
  // edit(i, j): its key if it can be typed over; on(i, j): whether it lights.
  const table = (o) => {
    const { values, head = () => null, pick, edit, on = () => false, digits = 3, sums } = o;
    const most = o.most ?? largest(values);
    const cell = (v, i, j) => {
      const h = head(i, j);
      const key = pick?.(i, j);
      const chosen = key && P.state.pick.join() === key;
      const attributes = [
        `class="${h === null ? "" : `h${h}`}${on(i, j) ? " on" : ""}${v === -Infinity || v === 0 ? " no" : ""}"`,
        `data-v="${share(v, most).toFixed(3)}"`,
        key ? `data-pick="${key}" role="gridcell" tabindex="${chosen ? 0 : -1}" aria-selected="${Boolean(chosen)}"` : "",
      ];
      const name = esc(`${o.name}, ${o.numbered ? i : P.state.tokens[i] ?? i}, ${j}`);
      const inside = edit
        ? `<input type="text" inputmode="decimal" autocomplete="off" size="6" data-edit="${edit(i, j)}" value="${+v.toFixed(4)}" aria-label="${name}">`
        : num(v, digits);
      return `<td ${attributes.join(" ")}>${inside}</td>`;
    };
    const heads = (o.columns ?? times(values[0].length, String)).map((c, j) => `<th scope="col"${head(0, j) !== null && o.colored ? ` class="t${head(0, j)}"` : ""}>${esc(c)}</th>`);
    const lines = values.map((row, i) => {
      const first = o.numbered || o.names ? esc(o.names?.[i] ?? i) : token(i);
      const sum = sums ? `<td class="sum${Math.abs(sums[i] - 1) > 1e-9 ? " bad" : ""}">${num(sums[i], 2)}</td>` : "";
      return `<tr><th scope="row">${first}</th>${row.map((v, j) => cell(v, i, j)).join("")}${sum}</tr>`;
    });
    const corner = `<td class="corner"></td>`;
    return (
      scroll(o.name, `<table${pick ? ' role="grid"' : ""}><caption>${o.caption ?? esc(o.name)}</caption>` +
      `<thead><tr>${corner}${heads.join("")}${sums ? '<th scope="col">sum</th>' : ""}</tr></thead><tbody>${lines.join("")}</tbody></table>`)
    );
  };

  const ofHead = (h) => `<span class="t${h}">head ${h}</span>`;
  // One table per head, of the columns' tokens.
  const perHead = (name, values, o = {}) =>
    values
      .map((v, h) =>
        table({
          name: `${name} of head ${h}`,
          caption: `${name}, ${ofHead(h)}`,
          values: v,
          head: () => h,
          pick: (i, j) => `${h},${i},${j}`,
          most: largest(values),
          ...o,
          sums: o.sums?.(h),
        }),
      )
      .join("");
  const byToken = () => P.state.tokens.map((t) => (t.length > 8 ? `${t.slice(0, 7)}…` : t));

  // Numbers as they lie in memory.
  const strip = (name, values, head, on = () => false) =>
    `<ol class="strip" role="list" aria-label="${esc(name)}">` +
    values.map((v, a) => `<li class="h${head(a)}${on(a) ? " on" : ""}" data-v=".4"><small>${a}</small>${num(v, 2)}</li>`).join("") +
    "</ol>";

  const code = (name) => {
    const { step, whole, noTranspose, noBack } = P.state;
    // The lines as they run: with the mistakes that were made.
    const lines = data.code[name].map(([text, steps]) => {
      if (noTranspose) text = text.replace(/view.B, T.*/, "view(B, H, T, d)");
      return [noBack ? text.replace(/(contexts).transpose.*/, "$1") : text, steps];
    });
    const runs = lines.map(([, steps]) => steps.includes(step));
    const shown = lines.map((_, l) => whole || runs[l] || (runs[l + 1] ?? false) || (runs[l - 1] ?? false));
    const indent = whole ? 0 : Math.min(...lines.filter((_, l) => shown[l]).map(([text]) => text.search(/\S/)));
    const items = lines.map(([text], l) =>
      shown[l]
        ? `<span class="line${runs[l] ? " runs" : ""}">${runs[l] ? '<span class="unseen">runs now: </span>' : ""}${esc(text.slice(indent))}\n</span>`
        : "",
    );
    return `<pre class="code" role="group" aria-label="code of the ${name} class">${items.join("")}</pre>`;
  };

  const choice = (name, options, chosen, legend) =>
    `<fieldset class="choice"><legend>${legend}</legend>${options
      .map(([value, label]) => `<label><input type="radio" name="${name}" data-set="${name}" value="${value}"${String(chosen) === String(value) ? " checked" : ""}> ${label}</label>`)
      .join("")}</fieldset>`;
  const toggle = (name, label) =>
    `<button class="switch" data-toggle="${name}" aria-pressed="${Boolean(P.state[name])}">${label}</button>`;

  Object.assign(P, { esc, scroll, num, gap, token, largest, table, perHead, byToken, strip, code, choice, toggle, ofHead });
})();
