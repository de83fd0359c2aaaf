"use strict";
// Exercises: every answer is computed when it is checked, and a wrong one gets its reason.
(() => {
  const P = window.polyhead;
  const { times, num, esc, token } = P;
  const whole = () => P.stacked({ ...P.state, silent: -1, edit: null, out: "none" });
  const right = (text) => ({ ok: true, text: `Yes. ${text}` });
  const wrong = (text) => ({ ok: false, text });
  const field = (name, label) =>
    `<label>${label} <input type="text" inputmode="decimal" autocomplete="off" size="10" name="${name}"></label>`;
  const radios = (name, options) =>
    options.map(([value, label]) => `<label class="option"><input type="radio" name="${name}" value="${value}"> <code>${label}</code></label>`).join("");
  const number = (text) => Number(String(text ?? "").replace(/[\s_]/g, "").replace(/,(?=\d{3}\b)/g, ""));

  const sizes = {
    ask: "You want two numbers per token out of two stacked heads. What is d_out?",
    form: () => field("answer", "d_out ="),
    check: ({ answer }) => {
      const d = number(answer);
      if (!Number.isInteger(d) || d < 1) return wrong("A size is a whole number from 1 on.");
      return 2 * d === 2 ? right("Two heads of one number each.") : wrong(`2 heads of d_out = ${d} give 2 × ${d} = ${2 * d} numbers: it is the size of one head.`);
    },
  };

  const line = {
    ask: "Which line splits the product (B, T, H·d) into heads (B, H, T, d)?",
    form: () =>
      radios("answer", [
        ["view", "q.view(B, H, T, d)"],
        ["transpose", "q.view(B, T, H, d).transpose(1, 2)"],
        ["permute", "q.view(B, T, d, H).permute(0, 3, 1, 2)"],
      ]),
    check: ({ answer }) => {
      const { H, d, T } = P.state;
      const { query } = whole();
      const strip = P.tensor(times(T, (t) => query.flatMap((head) => head[t])).flat(), [T, H * d]);
      const runs = {
        view: () => P.view(strip, H, T, d),
        transpose: () => P.permute(P.view(strip, T, H, d), 1, 0, 2),
        permute: () => P.permute(P.view(strip, T, d, H), 2, 0, 1),
      };
      if (!runs[answer]) return wrong("Choose one.");
      const split = P.nested(runs[answer]());
      const off = split.flat(2).filter((v, i) => v !== query.flat(2)[i]).length;
      const why = { view: "it cuts the strip where tokens end, not where heads do", permute: "it deals the features out to the heads in turn" };
      if (answer === "transpose") return right("Run on the strip of this page, every number is its head's.");
      return off ? wrong(`Run on this page's strip, ${off} of ${query.flat(2).length} numbers are in the wrong place: ${why[answer]}.`) : wrong("On these sizes it happens to give the same; take more heads, tokens and features, and it does not.");
    },
  };

  const order = {
    ask: "In which order must they run?",
    form: () =>
      radios("answer", [
        ["scale,mask,softmax", "scale, mask, softmax"],
        ["scale,softmax,mask", "scale, softmax, mask"],
        ["softmax,scale,mask", "softmax, scale, mask"],
        ["mask,scale,softmax", "mask, scale, softmax"],
      ]),
    check: ({ answer }) => {
      if (!answer) return wrong("Choose one.");
      const { d, causal } = P.state;
      if (!causal) return wrong("Switch the mask on: causal, in the bar below.");
      const found = whole();
      const runs = {
        scale: (row) => row.map((v) => v / Math.sqrt(d)),
        softmax: P.softmax,
      };
      let most = 0;
      let sum = 1;
      found.scores.forEach((head, h) =>
        head.forEach((row, i) => {
          let soft = false;
          const mask = (r) => r.map((v, j) => (j > i ? (soft ? 0 : -Infinity) : v));
          const got = answer.split(",").reduce((r, op) => {
            const next = op === "mask" ? mask(r) : runs[op](r);
            soft ||= op === "softmax";
            return next;
          }, row);
          most = Math.max(most, P.apart(got, found.weights[h][i]));
          const total = got.reduce((a, b) => a + b);
          if (Math.abs(total - 1) > Math.abs(sum - 1)) sum = total;
        }),
      );
      if (most > 1e-12) return wrong(`Run on this page's scores, a row sums to ${num(sum, 3)}: the weights are wrong by up to ${P.gap(most)}.`);
      return right(answer[0] === "m" ? "The lecture does just this: -inf / √d is still -inf." : "The mask before the softmax, so that what is left sums to 1.");
    },
  };

  const place = () => [0, Math.min(1, P.state.T - 1), 0];
  const weight = {
    ask: () => `What is the weight of <q>${token(place()[1])}</q> on <q>${token(0)}</q> in head 0, to 3 digits?`,
    form: () => field("answer", "weight ="),
    check: ({ answer }) => {
      const [h, i, j] = place();
      const found = whole();
      const given = number(answer);
      const near = (v) => Math.abs(given - v) < 0.000501;
      if (String(answer ?? "").trim() === "" || !Number.isFinite(given)) return wrong("A number, such as 0.123.");
      if (near(found.weights[h][i][j])) return right(`exp(${num(found.masked[h][i][j], 4)}) over the sum of its row: ${num(found.weights[h][i][j], 4)}.`);
      if (near(found.scores[h][i][j])) return wrong("That is the score: scale it, and take the softmax of its row.");
      if (near(found.masked[h][i][j])) return wrong("That is the scaled score: the softmax of its row is missing.");
      if (i && near(found.weights[h][j][i])) return wrong("That is the other way round: rows are queries, columns are keys.");
      if (i && near(found.weights[h][i][i])) return wrong("That is its weight on itself.");
      if (near(P.softmax(found.scores[h][i].map((v) => v / Math.sqrt(P.state.d)))[j])) return wrong("That is without the mask: keys ahead have taken their part.");
      return wrong(`Not within 0.0005: look at row ${esc(P.state.tokens[i])}, column ${esc(P.state.tokens[j])} of head 0.`);
    },
  };

  const columns = {
    ask: "Head 0 is silenced. Which columns of the output change?",
    form: () =>
      ["without", "with"].map((name) => `<fieldset class="choice"><legend>${name} out_proj</legend>${times(P.state.H * P.state.d, (c) => `<label><input type="checkbox" name="${name}" value="${c}"> ${c}</label>`).join("")}</fieldset>`).join(""),
    check: (answers) => {
      const loud = whole().merged;
      const hush = P.stacked({ ...P.state, silent: 0, edit: null, out: "none" }).merged;
      const truth = { without: [loud, hush], with: [loud, hush].map((m) => P.project(m, P.state.w)) };
      for (const name of ["without", "with"]) {
        const [a, b] = truth[name];
        const given = [answers[name] ?? []].flat().map(Number);
        for (const c of times(a[0].length, (n) => n)) {
          const moves = a.some((row, i) => row[c] !== b[i][c]);
          if (moves === given.includes(c)) continue;
          return wrong(name === "without" ? `Without out_proj: column ${c} belongs to head ${Math.floor(c / P.state.d)}, and ${moves ? "changes" : "stays"}.` : `With out_proj: column ${c} has a part of every head, and ${moves ? "changes" : "stays"}.`);
        }
      }
      return right("Its own columns without the projection, every column with it.");
    },
  };

  const parameters = {
    ask: "How many parameters has MultiHeadAttention(768, 768, 1024, 0.0, num_heads=12), without biases of q, k, v? And with num_heads=1?",
    form: () => field("twelve", "12 heads") + field("one", "1 head"),
    check: ({ twelve, one }) => {
      const count = (heads) => 3 * 768 * heads * (768 / heads) + 768 * 768 + 768;
      const said = [number(twelve), number(one)];
      if (said.some((n) => !Number.isInteger(n) || n < 1)) return wrong("Two whole numbers.");
      if (said[0] === count(12) && said[1] === count(1)) return right("The split cuts features among heads; it adds none.");
      if (said[0] === 3 * 768 * 768) return wrong("That is W_query, W_key and W_value: out_proj has weights, too.");
      if (said[0] === count(12) - 768) return wrong("out_proj has a bias: 768 more.");
      if (said[0] === count(12)) return wrong("The number of heads is nowhere in the shapes of the weights.");
      return wrong("Four weights of 768 × 768, and the bias of out_proj.");
    },
  };

  P.exercises = { 1: sizes, 3: line, 5: order, 6: weight, 9: columns, 10: parameters };
})();
