"use strict";
// The state, what changes it, and drawing it: the page is patched, so that focus and scroll stay.
(() => {
  const P = window.polyhead;
  const { data, unpack, rows, gap, esc, times, apart } = P;
  const byId = (id) => document.getElementById(id);
  const clone = (value) => JSON.parse(JSON.stringify(value));

  const T = data.tokens.length;
  const inputs = data.x[0].length;
  const D = data.heads * data.size;
  const loaded = { x: data.x, w: {} };
  for (const name of ["W_query", "W_key", "W_value"]) loaded.w[name] = rows(unpack(data.weights[name]), inputs);
  loaded.w.W_out = rows(unpack(data.weights.W_out), D);
  loaded.w.bias = unpack(data.weights.bias);

  const RIGHT = { silent: -1, edit: null, noTranspose: false, noBack: false, maskAfter: false, unconverted: false };
  const state = (P.state = {
    step: 1, tokens: data.tokens, ...clone(loaded), H: data.heads, d: data.size, T, seed: data.seed,
    causal: true, out: "none", ...RIGHT, pick: [0, Math.min(1, T - 1), 0], proj: "query", dout: data.size,
    whole: false, thousand: null, answered: {},
  });

  const pristine = () => {
    const { x, w, H, d, causal } = state;
    if (H !== data.heads || d !== data.size || !causal) return false;
    if (Object.keys(RIGHT).some((name) => state[name] !== RIGHT[name])) return false;
    return apart(x, loaded.x) === 0 && Object.keys(w).every((name) => apart(w[name], loaded.w[name]) === 0);
  };
  // The largest difference of both lanes to what torch computed; null once something was changed.
  P.torch = () => {
    if (!pristine()) return null;
    const { left, right } = P.now;
    const names = Object.keys(data.torch).filter((name) => name !== "output");
    const lanes = names.map((name) => Math.max(...[left, right].map((lane) => apart(lane[name], unpack(data.torch[name])))));
    return Math.max(...lanes, apart(P.project(left.merged, state.w), unpack(data.torch.output)));
  };

  const compute = () => {
    const { pick, H, T: n, d, step } = state;
    const last = step === 4 || step === 5 || step === 6 ? n : d;
    state.pick = [pick[0] % H, Math.min(pick[1], n - 1), Math.min(pick[2], last - 1)];
    const left = P.stacked(state);
    const right = P.split(state);
    P.now = { left, right, gap: apart(left.projected, right.projected) };
  };

  // Patch one element into what another is.
  const patch = (from, to) => {
    for (const { name } of [...from.attributes]) if (!to.hasAttribute(name) && name !== "style" && name !== "open") from.removeAttribute(name);
    for (const { name, value } of to.attributes) if (from.getAttribute(name) !== value) from.setAttribute(name, value);
    if (from.tagName === "INPUT") {
      if (from !== document.activeElement || from.type === "radio") from.value = to.value;
      from.checked = to.checked;
      return;
    }
    const value = from.tagName === "SELECT" ? to.value : undefined;
    const [old, fresh] = [[...from.childNodes], [...to.childNodes]];
    fresh.forEach((node, i) => {
      const was = old[i];
      if (!was) from.append(node);
      else if (was.nodeName !== node.nodeName) was.replaceWith(node);
      else if (was.nodeType === 3) { if (was.data !== node.data) was.data = node.data; }
      else patch(was, node);
    });
    old.slice(fresh.length).forEach((node) => node.remove());
    if (value !== undefined) from.value = value;
  };
  const draw = (element, text, replace) => {
    const template = document.createElement("template");
    template.innerHTML = text;
    if (replace) element.replaceChildren(template.content);
    else {
      const to = element.cloneNode(false);
      to.append(template.content);
      patch(element, to);
    }
    for (const sized of element.querySelectorAll("[data-v]")) sized.style.setProperty("--v", sized.dataset.v);
  };

  // What is wider than its place can be scrolled by keys; nothing else takes the focus for that.
  const fit = () => {
    for (const box of document.querySelectorAll(".scroll, .code"))
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
  };
  addEventListener("resize", fit);

  const MISTAKES = {
    noTranspose: "the transpose is forgotten", noBack: "the transpose back is forgotten",
    maskAfter: "the mask comes after the softmax", unconverted: "the weights are not converted",
  };
  const foot = () => {
    const same = P.now.gap < 1e-9;
    const why = Object.keys(MISTAKES).filter((name) => state[name]).map((name) => MISTAKES[name]);
    if (state.out === "right") why.push("out_proj is in one class only");
    const changes = why.length > 0 || state.edit !== null || state.silent >= 0;
    return (
      `<p role="status"><span class="verdict ${same ? "good" : "bad"}">${same ? "the same" : "NOT the same"}</span> Largest difference of the two: <b id="gap">${gap(P.now.gap)}</b>` +
      `${why.length ? `<span class="why">${why.join("; ")}</span>` : ""}</p>` +
      (changes ? '<button data-undo="all">Put it right</button>' : "") +
      `<span class="turn"><button data-step="${state.step - 1}"${state.step === 1 ? " disabled" : ""}>Back</button><button class="next" data-step="${state.step + 1}"${state.step === 10 ? " disabled" : ""}>Next</button></span>`
    );
  };

  const bar = () => {
    const pair = (name, label, chosen) =>
      `<label>${label} <select data-size="${name}">${times(4, (n) => `<option${n + 1 === chosen ? " selected" : ""}>${n + 1}</option>`).join("")}</select></label>`;
    return (
      pair("H", "Heads", state.H) + pair("d", "Size of a head", state.d) +
      `<label><input type="checkbox" data-causal="1"${state.causal ? " checked" : ""}> causal</label>` +
      `<label>Seed <input type="number" min="0" max="4294967295" value="${state.seed}" data-number="seed"></label>` +
      '<button data-do="random">Random input</button><button data-do="reset">Start again</button>'
    );
  };

  const exercise = (step) => {
    const found = P.exercises[step];
    if (!found) return "";
    const answered = state.answered[step];
    return (
      `<section class="exercise" aria-labelledby="ask"><h3>Exercise</h3><form data-exercise="${step}" novalidate><p id="ask">${typeof found.ask === "function" ? found.ask() : found.ask}</p>` +
      `<div class="answers">${found.form()}</div><button type="submit">Check</button>` +
      `<p class="answer ${answered ? (answered.ok ? "good" : "bad") : ""}" role="status">${answered ? answered.text : ""}</p></form></section>`
    );
  };

  let drawn = 0;
  const render = () => {
    compute();
    const { step, whole } = state;
    const [, title, says, formula] = data.steps[step - 1];
    const { shared = "", three, left, right, controls = "", todo, reads } = P.figures[step - 1]();
    const lane = (name, title, figure) =>
      `<section class="lane" aria-labelledby="${name}"><h3 id="${name}">${title}</h3>${P.code(name)}<div class="figure">${figure}</div></section>`;
    draw(
      byId("step"),
      `<h2 id="title" tabindex="-1"><span class="count">${step} of 10</span>${esc(title)}</h2><p class="says">${esc(says)}</p><p class="formula"><code>${esc(formula)}</code></p>` +
        `<section class="try" aria-labelledby="todo"><h3 class="unseen">To do</h3><p id="todo">${todo}</p>${controls}${reads}</section>` +
        `<div class="figures${three ? " three" : ""}">${shared ? `<div class="shared">${shared}</div>` : ""}` +
        `<div class="lanes">${lane("stacked", "Stacked heads", left)}${lane("split", "Weight split", right)}</div></div>` +
        `<button class="quiet" data-toggle="whole" aria-pressed="${whole}">All lines of both classes</button>${exercise(step)}`,
      drawn !== step,
    );
    drawn = step;
    draw(byId("foot"), foot());
    draw(byId("bar"), bar());
    draw(
      byId("steps"),
      data.steps.map(([name], n) => `<li><button data-step="${n + 1}"${n + 1 === step ? ' aria-current="step"' : ""}><span>${n + 1}</span> ${esc(name)}</button></li>`).join(""),
    );
    fit();
  };

  const go = (step, focus = true) => {
    if (!(step >= 1 && step <= 10)) return;
    state.step = step;
    render();
    if (focus) {
      scrollTo(0, 0);
      byId("title").focus({ preventScroll: true });
    }
    byId("steps").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
    try {
      history.replaceState(null, "", `#${step}`);
    } catch { /* a frame of a notebook has no address */ }
  };

  const redraw = () => {
    state.w = P.drawStacked(state.seed, state.H, state.d, state.x[0].length);
    Object.assign(state, RIGHT, { thousand: null });
  };
  const actions = {
    random() {
      state.x = state.x.map((row) => row.map(() => Math.round(Math.random() * 100) / 100));
    },
    reset() {
      Object.assign(state, clone(loaded), RIGHT, { H: data.heads, d: data.size, seed: data.seed, causal: true, out: "none", thousand: null, answered: {} });
    },
    thousand() {
      state.thousand = 0;
      const normal = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
      for (let n = 0; n < 1000; n++) {
        const tried = { ...state, x: state.x.map((row) => row.map(normal)) };
        state.thousand = Math.max(state.thousand, apart(P.stacked(tried).projected, P.split(tried).projected));
      }
    },
  };

  const type = (key, text) => {
    const [name, i, j] = key.split(",");
    const value = Number(text);
    if (text.trim() === "" || !Number.isFinite(value)) return false;
    (name === "x" ? state.x : state.w[name])[i][j] = value;
    state.thousand = null;
    return true;
  };

  document.addEventListener("input", ({ target }) => {
    const { edit, slide, number, set } = target.dataset;
    if (edit) {
      const invalid = !type(edit, target.value);
      target.setAttribute("aria-invalid", invalid);
      if (invalid) return;
    } else if (slide) {
      const [h, i, j] = state.pick;
      state.edit = { h, i, j, value: Number(target.value) };
    } else if (number) {
      const value = Number(target.value);
      if (!target.checkValidity() || target.value === "" || !Number.isInteger(value)) return;
      state[number] = value;
      if (number === "seed") redraw();
    } else if (set) state[set] = set === "silent" ? Number(target.value) : target.value;
    else return;
    render();
  });
  document.addEventListener("change", ({ target }) => {
    const { size, causal, edit } = target.dataset;
    if (size) {
      state[size] = Number(target.value);
      redraw();
    } else if (causal) state.causal = target.checked;
    else if (edit) {
      // Whatever is no number is put back.
      const [name, i, j] = edit.split(",");
      target.value = +(name === "x" ? state.x : state.w[name])[i][j].toFixed(4);
      target.removeAttribute("aria-invalid");
      return;
    } else return;
    render();
  });
  const choose = (key) => {
    state.pick = key.split(",").map(Number);
    render();
  };
  document.addEventListener("click", ({ target }) => {
    const hit = target.closest("[data-step], [data-toggle], [data-do], [data-undo], [data-pick]");
    if (!hit) return;
    const { step, toggle, undo, pick } = hit.dataset;
    if (step) return go(Number(step));
    if (pick) return choose(pick);
    if (toggle) state[toggle] = !state[toggle];
    else if (undo === "edit") state.edit = null;
    else if (undo) Object.assign(state, RIGHT, { out: "none" });
    else actions[hit.dataset.do]();
    render();
  });
  document.addEventListener("submit", (event) => {
    event.preventDefault();
    const form = event.target;
    const answers = {};
    for (const [name, value] of new FormData(form)) answers[name] = name in answers ? [answers[name], value].flat() : value;
    state.answered[form.dataset.exercise] = P.exercises[form.dataset.exercise].check(answers);
    render();
  });

  // Arrow keys in a table of numbers: to the next cell, over the edge of one head's to the next's.
  document.addEventListener("keydown", (event) => {
    const cell = event.target.closest?.("[data-pick]");
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!cell || !move) return;
    event.preventDefault();
    const lane = cell.closest(".lane");
    const grid = (c) => [...c.closest("tbody").rows].map((row) => [...row.querySelectorAll("[data-pick]")]);
    const cells = grid(cell);
    const i = cells.findIndex((row) => row.includes(cell));
    const j = cells[i].indexOf(cell);
    let next = cells[i + move[0]]?.[j + move[1]];
    if (!next && move[1]) {
      const tables = [...lane.querySelectorAll("table")].filter((t) => t.querySelector("[data-pick]"));
      const other = tables[tables.indexOf(cell.closest("table")) + move[1]];
      const there = other && [...other.tBodies[0].rows][i]?.querySelectorAll("[data-pick]");
      next = there?.[move[1] > 0 ? 0 : there.length - 1];
    }
    if (!next) return;
    choose(next.dataset.pick);
    next.focus();
  });

  addEventListener("hashchange", () => go(Number(location.hash.slice(1))));
  go(Number(location.hash.slice(1)) || 1, false);
  if (drawn === 0) go(1, false);
})();
