"use strict";
// The ten steps: what each lane shows, and what there is to try.
(() => {
  const P = window.polyhead;
  const { data, scroll, num, gap, token, table, perHead, byToken, strip, choice, toggle, ofHead, times, esc } = P;
  const reads = (html) => `<p class="reads" aria-live="polite">${html}</p>`;
  const shape = (...sizes) => `<code>(${sizes.join(", ")})</code>`;
  const signed = (v, digits = 4) => num(v, digits);
  const sum = (terms) => terms.join(" + ").replace(/\+ -/g, "− ");
  const product = (a, b) => sum(a.map((v, i) => `${signed(v)} × ${signed(b[i])}`));
  const letter = { query: "q", key: "k", value: "v" };

  const blocks = (heads, size) =>
    `<div class="blocks" aria-hidden="true">${times(heads, (h) => `<span class="block h${h}" data-v=".6">${"<i></i>".repeat(size)}</span>`).join("")}</div>`;

  const input = () => {
    const { H, d, T, x, dout } = P.state;
    const fits = dout % H === 0;
    const agree = fits && dout === H * d;
    return {
      three: true,
      shared: table({ name: "x", caption: "x: type over any number", values: x, edit: (i, j) => `x,${i},${j}`, digits: 2 }),
      left: `<p class="call"><code>MultiHeadAttentionWrapper(d_out=${d}, num_heads=${H})</code></p>${blocks(H, d)}<p>${H} × ${d} = <b>${H * d}</b> numbers per token: ${shape(T, H * d)}</p>`,
      right: `<p class="call"><code>MultiHeadAttention(d_out=<input type="number" min="1" max="16" value="${dout}" data-number="dout" aria-label="d_out of the split class">, num_heads=${H})</code></p>${
        fits
          ? `${blocks(H, dout / H)}<p>${dout} numbers per token, ${dout / H} per head: ${shape(T, dout)}</p>`
          : `<p class="bad">d_out = ${dout} cannot be divided among ${H} heads: the class refuses.</p>`
      }`,
      todo: "Set d_out of the split class until the shapes agree.",
      reads: reads(agree ? `Both give ${shape(T, H * d)}. From here on the page uses d_out = ${d} on the left and ${dout} on the right.` : `${shape(T, H * d)} is not ${fits ? shape(T, dout) : "an error"}.`),
    };
  };

  const projections = () => {
    const { H, d, w, x, pick, proj } = P.state;
    const [h, t, e] = pick;
    const name = `W_${proj}`;
    const { left, right } = P.now;
    const features = times(x[0].length, String);
    const weight = (rows, first, caption) =>
      table({
        name: caption.replace(/<[^>]*>/g, ""), caption, values: rows, numbered: true, columns: features, most: P.largest(w[name]),
        head: (i) => Math.floor((first + i) / d), edit: (i, j) => `${name},${first + i},${j}`,
        on: (i) => first + i === h * d + e,
      });
    const large = P.nested(right.large[proj]);
    return {
      left: times(H, (n) => `<div class="pair">${weight(w[name].slice(n * d, n * d + d), n * d, `${name}, ${ofHead(n)}`)}${perHead(letter[proj], left[proj], { digits: 3 }).split(/(?=<div class="scroll")/)[n]}</div>`).join(""),
      right:
        weight(right.w[name], 0, `${name}, all heads`) +
        table({
          name: `x ${name}, one product`, values: large, head: (i, j) => Math.floor(j / d),
          pick: (i, j) => `${Math.floor(j / d)},${i},${j % d}`,
        }),
      controls: choice("proj", [["query", "queries"], ["key", "keys"], ["value", "values"]], proj, "Show"),
      todo: "Choose a number of the product: its weight row lights in both lanes. Type over a weight: it is the same one in both.",
      reads: reads(`${letter[proj]} of ${ofHead(h)}, <q>${token(t)}</q>, feature ${e}: ${product(x[t], w[name][h * d + e])} = <b>${signed(left[proj][h][t][e])}</b>`),
    };
  };

  const splitting = () => {
    const { H, d, T, pick, noTranspose } = P.state;
    const [h, t, e] = pick;
    const { left, right } = P.now;
    const D = H * d;
    const owner = (a) => Math.floor((a % D) / d);
    const address = (n, i, j) => (noTranspose ? n * T * d + i * d + j : i * D + n * d + j);
    const line = (name, sizes, strides) => `<tr><th scope="row">${name}</th><td>${shape(...sizes)}</td><td>${shape(...strides)}</td></tr>`;
    const steps = noTranspose
      ? [["view", [H, T, d], [T * d, d, 1]]]
      : [["view", [T, H, d], [D, d, 1]], ["transpose", [H, T, d], [d, D, 1]]];
    const [, , strides] = steps.at(-1);
    const here = address(h, t, e);
    return {
      left: `<p>Nothing to split: each head made its own.</p><div class="heads">${perHead("q", left.query)}</div>`,
      right:
        `<p class="caption">The product in memory, <code>q.view(-1)</code></p>${strip("the product in memory", right.large.query.strip, owner, (a) => a === here)}` +
        scroll("shapes and strides", `<table class="plain"><thead><tr><td class="corner"></td><th scope="col">shape</th><th scope="col">strides</th></tr></thead><tbody>${[["x W_query", [T, D], [D, 1]], ...steps].map((s) => line(...s)).join("")}</tbody></table>`) +
        `<div class="heads">${right.query.map((v, n) => table({ name: `q of head ${n}`, caption: `q, ${ofHead(n)}`, values: v, numbered: noTranspose, head: (i, j) => owner(address(n, i, j)), pick: (i, j) => `${n},${i},${j}` })).join("")}</div>`,
      controls: toggle("noTranspose", "Forget the transpose"),
      todo: "Choose a number of a head and find it in memory. Then forget the transpose: the shape is the same, and the colors mix.",
      reads: reads(`${ofHead(h)}, row ${t}, feature ${e} lies at ${h}·${strides[0]} + ${t}·${strides[1]} + ${e}·1 = <b>${here}</b>${owner(here) === h && Math.floor(here / D) === t ? "" : `: that is <q>${token(Math.floor(here / D))}</q> of ${ofHead(owner(here))}!`}`),
    };
  };

  const square = (name, values, o) => `<div class="heads">${perHead(name, values, { columns: byToken(), ...o })}</div>`;

  const scores = () => {
    const [h, i, j] = P.state.pick;
    const { left, right } = P.now;
    return {
      left: square("scores", left.scores),
      right: `<p>One batched product, ${shape(right.scores.length, P.state.T, P.state.T)}.</p>${square("scores", right.scores)}`,
      todo: "Choose a score and see it taken apart.",
      reads: reads(`${ofHead(h)}, query <q>${token(i)}</q>, key <q>${token(j)}</q>: ${product(left.query[h][i], left.key[h][j])} = <b>${signed(left.scores[h][i][j])}</b>`),
    };
  };

  const masking = () => {
    const { pick, d, maskAfter, causal } = P.state;
    const [h, i, j] = pick;
    const { left, right } = P.now;
    const name = maskAfter ? "weights" : "masked";
    const sums = (lane) => (maskAfter ? (n) => lane.weights[n].map((row) => row.reduce((a, b) => a + b)) : undefined);
    const ahead = causal && j > i;
    return {
      left: square(name, left[name], { sums: sums(left) }),
      right: `<p>One mask for all heads.</p>${square(name, right[name], { sums: sums(right) })}`,
      controls: toggle("maskAfter", "Mask after the softmax"),
      todo: "Mask after the softmax, in the split class alone: its rows no longer sum to 1, since keys ahead have taken their part already.",
      reads: reads(`${signed(left.scores[h][i][j])} / √${d} = ${signed(left.scores[h][i][j] / Math.sqrt(d))}${ahead ? `, but <q>${token(j)}</q> stands ahead of <q>${token(i)}</q>: <b>-inf</b>` : ""}`),
    };
  };

  const weighing = () => {
    const { pick, edit, tokens } = P.state;
    const [h, i, j] = pick;
    const { left, right } = P.now;
    const sums = (lane) => (n) => lane.weights[n].map((row) => row.reduce((a, b) => a + b));
    const masked = left.masked[h][i][j];
    const row = left.weights[h][i];
    const open = masked !== -Infinity;
    return {
      left: square("weights", left.weights, { sums: sums(left) }),
      right: square("weights", right.weights, { sums: sums(right) }),
      controls:
        `<label class="slide"><span>score of <q>${token(i)}</q> for <q>${token(j)}</q>, head ${h}</span> <input type="range" min="-4" max="4" step="0.01" value="${open ? masked.toFixed(2) : 0}" data-slide="1"${open ? "" : " disabled"}> <output>${num(masked, 2)}</output></label>` +
        (edit ? '<button data-undo="edit">Undo</button>' : ""),
      todo: "Choose a weight, then drag its score: its row alone changes.",
      reads:
        `<ul class="bars" aria-label="weights of ${token(i)} in head ${h}">${row.map((v, n) => `<li><span>${esc(tokens[n])}</span><i class="h${h}" data-v="${v.toFixed(3)}"></i><b>${num(v)}</b></li>`).join("")}</ul>` +
        reads(open ? `exp(${signed(masked)}) / sum of its row = <b>${signed(row[j])}</b>` : `exp(-inf) = 0: <b>no weight</b>`),
    };
  };

  const contexts = () => {
    const { pick } = P.state;
    const [h, i, e] = pick;
    const { left, right } = P.now;
    const terms = left.weights[h][i].map((v, j) => [v, left.value[h][j][e]]).filter(([v]) => v > 0);
    return {
      left: `<div class="heads">${perHead("contexts", left.contexts)}</div>`,
      right: `<p>One batched product again, ${shape(right.contexts.length, P.state.T, P.state.d)}.</p><div class="heads">${perHead("contexts", right.contexts)}</div>`,
      todo: "Choose a token and a feature.",
      reads: reads(`${ofHead(h)}, <q>${token(i)}</q>, feature ${e}: ${sum(terms.map(([v, u]) => `${num(v)} × ${num(u)}`))} = <b>${signed(left.contexts[h][i][e])}</b>`),
    };
  };

  const together = () => {
    const { H, d, T, pick, noBack } = P.state;
    const [h, t, e] = pick;
    const { left, right } = P.now;
    const D = H * d;
    const before = (a) => Math.floor(a / (T * d));
    const after = noBack ? before : (a) => Math.floor((a % D) / d);
    const from = h * T * d + t * d + e;
    const to = noBack ? from : t * D + h * d + e;
    const merged = (name, values, owner) =>
      table({ name, values, head: (i, j) => owner(i * D + j), pick: (i, j) => `${Math.floor(j / d)},${i},${j % d}` });
    return {
      left: `<p><code>torch.cat(heads, dim=-1)</code></p>${merged("concatenated", left.merged, (a) => Math.floor((a % D) / d))}`,
      right:
        `<p class="caption">Contexts in memory, head by head</p>${strip("contexts in memory", right.before, before, (a) => a === from)}` +
        `<p class="caption">${noBack ? "viewed as they lie" : "after transpose and contiguous: token by token"}</p>${strip("merged in memory", right.after, after, (a) => a === to)}` +
        merged(`view(${T}, ${D})`, right.merged, after),
      controls: toggle("noBack", "Forget the transpose back"),
      todo: "Choose a number and follow it from the first strip to the second. Then forget the transpose back.",
      reads: reads(`${ofHead(h)}, <q>${token(t)}</q>, feature ${e}: from place ${from} to place <b>${to}</b>${noBack ? ", where it lay: row " + Math.floor(to / D) + " of the output" : ""}`),
    };
  };

  const changed = (a, b) => times(a[0].length, (c) => (a.some((row, i) => row[c] !== b[i][c]) ? c : -1)).filter((c) => c >= 0);

  const projecting = () => {
    const { H, d, T, w, out, silent } = P.state;
    const { left, right } = P.now;
    const D = H * d;
    const of = (h) => times(T, (t) => w.W_out.map((row) => P.dot(row.slice(h * d, h * d + d), right.contexts[h][t])));
    const whole = P.stacked({ ...P.state, silent: -1, edit: null, out: "none" }).merged;
    const loud = P.project(whole, w);
    const quiet = silent < 0 ? "" : (() => {
      const hush = P.stacked({ ...P.state, edit: null, out: "none" }).merged;
      const list = (c) => (c.length === D ? "all" : c.join(", ") || "none");
      return `Without ${ofHead(silent)} columns ${list(changed(whole, hush))} change before the projection, and ${list(changed(loud, P.project(hush, w)))} after it.`;
    })();
    const owner = (i, j) => Math.floor(j / d);
    return {
      left: out === "both"
        ? table({ name: "output", caption: "output, with out_proj=True", values: left.projected })
        : `<p>No projection: head by head.</p>${table({ name: "output", values: left.projected, head: owner, colored: true })}`,
      right:
        `<div class="heads">${times(H, (h) => table({ name: `contribution of head ${h}`, caption: `what ${ofHead(h)} contributes`, values: of(h), head: () => h })).join("")}</div>` +
        table({ name: "bias", values: [w.bias], names: ["bias"] }) +
        table({ name: "their sum, with the bias", values: P.project(right.merged, w) }),
      controls:
        choice("out", [["none", "neither class"], ["both", "both"], ["right", "the split alone, as in the lecture"]], out, "out_proj in") +
        choice("silent", [[-1, "none"], ...times(H, (h) => [h, `head ${h}`])], silent, "Silence"),
      todo: "Silence a head: which columns change, before and after the projection? Then give the projection to one class alone.",
      reads: reads(quiet || "Every column of the sum has a part of every head."),
    };
  };

  const DIGITS = [
    [[-0.45192, 0.221605, 0.477196, 0.106348], [-0.587435, 0.005776, 0.589073, 0.32566], [-0.630023, -0.063183, 0.620196, 0.385963],
      [-0.567457, -0.084253, 0.547769, 0.358925], [-0.552562, -0.098068, 0.532089, 0.342797], [-0.529901, -0.108068, 0.507653, 0.349348]],
    [[0.319018, 0.485763], [0.294346, 0.389676], [0.285575, 0.359278], [0.269264, 0.387327], [0.263871, 0.392796], [0.257474, 0.402783]],
  ];
  // The page's own numbers of the lecture's two calls, drawn anew.
  const lecture = () => {
    const base = { x: data.lecture, T: 6, H: 2, causal: true, silent: -1, edit: null, seed: 123, out: "none" };
    const a = P.stacked({ ...base, d: 2, w: P.drawStacked(123, 2, 2, 3) }).merged;
    const b = P.split({ ...base, d: 1, out: "both", w: P.drawSplit(123, 2, 1, 3) }).projected;
    return [a, b];
  };
  const ticks = () =>
    lecture().map((own, n) => {
      const lines = DIGITS[n].map((row, i) => `<tr>${row.map((v, j) => `<td>${v.toFixed(6)} ${Math.abs(own[i][j] - v) < 1e-6 ? '<b class="good">✓</b>' : '<b class="bad">✗</b>'}</td>`).join("")}</tr>`);
      return `<table class="plain digits"><caption>${n ? "MultiHeadAttention(3, 2, 6, 0.0, 2)" : "MultiHeadAttentionWrapper(3, 2, 6, 0.0, 2)"}</caption><tbody>${lines.join("")}</tbody></table>`;
    });

  const same = () => {
    const { H, unconverted, thousand } = P.state;
    const { products, milliseconds, heads, head_dim, tokens } = data.measured;
    const [first, second] = ticks();
    const order = (heads) => `<ol class="strip order" role="list">${heads.map(([n, h]) => `<li class="h${h}" data-v=".5">${n}</li>`).join("")}</ol>`;
    const names = ["q", "k", "v"];
    const reference = P.torch();
    const fact = (label, value, more = "") => `<tr><th scope="row">${label}</th><td><b>${value}</b> ${more}</td></tr>`;
    return {
      shared:
        `<table class="plain facts"><caption>Largest differences</caption><tbody>` +
        fact("stacked and split, here", gap(P.now.gap)) +
        fact("this page and torch, every step in float64", reference === null ? "–" : gap(reference), reference === null ? "torch's are of the numbers as they came" : "") +
        fact("gradients of both, in torch", gap(data.gradients)) +
        fact("1,000 random inputs", thousand === null ? "–" : gap(thousand), '<button data-do="thousand">Try 1,000</button>') +
        `</tbody></table><table class="plain facts"><caption>${heads} heads of ${head_dim}, ${tokens} tokens, on the machine that made this page</caption><tbody>` +
        fact("matrix products", `${products.stacked} and ${products.split}`, "stacked, split") +
        fact("time", `${milliseconds.stacked.toFixed(2)} and ${milliseconds.split.toFixed(2)} ms`, "stacked, split") +
        "</tbody></table>",
      left: `<p class="caption">Order in which a seed draws the weights</p>${order(times(H, (h) => names.map((n) => [n, h])).flat())}<p class="caption">The lecture's digits, and this page's</p>${scroll("the lecture's digits, stacked", first)}`,
      right: `<p class="caption">Order in which a seed draws the weights</p>${order(names.flatMap((n) => times(H, (h) => [n, h])))}<p class="caption">The lecture's digits, and this page's</p>${scroll("the lecture's digits, split", second)}`,
      controls: toggle("unconverted", "Same seed, not converted"),
      todo: "Give the split class its own weights of the same seed: the numbers are drawn in another order, so it is another function.",
      reads: reads(unconverted ? `Same seed, other order: they differ by ${gap(P.now.gap)}. <code>ph.convert.stacked_to_split</code> carries the weights over.` : 'Now a real model: <code>polyhead look "your text" --open</code>'),
    };
  };

  P.figures = [input, projections, splitting, scores, masking, weighing, contexts, together, projecting, same];
})();
