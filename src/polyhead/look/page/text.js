"use strict";
// The text: a token under the pointer or the focus shows where it looks, and who looks at it.
(() => {
  const { page } = window.polyhead;
  const text = page.byId("text");
  let spans = []; // one a token
  let chunkOf = []; // token -> number of its chunk
  let seen = new Set(); // chunks near the window
  let shown = { token: null, layers: [] }; // which tokens are tinted, and how much: two maps at most
  let painted = [];
  let hovered = null;

  const observer = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        const chunk = Number(target.dataset.chunk);
        if (isIntersecting) seen.add(chunk);
        else seen.delete(chunk);
      }
      paint();
    },
    { root: null, rootMargin: "200px" },
  );

  const ends = (token, length) => (length >= 120 && token.includes("\n")) || length >= 900;

  const spanOf = (token, at) => {
    const span = page.element("span", { className: "token", role: "option" });
    span.dataset.token = at;
    if (token.trim() !== "") {
      span.textContent = token.replace(/\r/g, "␍");
      if (token.includes("\n")) span.textContent = span.textContent.replace(/\n/g, "↵\n");
      return span;
    }
    span.classList.add("blank");
    span.textContent = page.quoted(at, 99).replace(/↵/g, "↵\n") || "∅";
    span.setAttribute("aria-label", token.includes("\n") ? "newline" : "space");
    return span;
  };

  // Chunks are blocks, so that the browser lays out only those in sight.
  const build = () => {
    const { tokens } = window.polyhead.data;
    observer.disconnect();
    seen = new Set();
    painted = [];
    spans = tokens.map(spanOf);
    chunkOf = [];
    const chunks = [];
    let chunk = null;
    spans.forEach((span, at) => {
      chunk ??= page.element("div", { className: "chunk", dir: "auto", role: "presentation" });
      chunk.append(span);
      chunkOf.push(chunks.length);
      if (ends(tokens[at], chunk.childElementCount) || at === spans.length - 1) {
        chunk.dataset.chunk = chunks.length;
        chunks.push(chunk);
        chunk = null;
      }
    });
    text.replaceChildren(...chunks);
    for (const made of chunks) observer.observe(made);
    page.byId("text-title").textContent = `The text, ${tokens.length} tokens`;
  };

  const paint = () => {
    for (const span of painted) {
      span.style.background = "";
      span.classList.remove("current", "tinted");
    }
    painted = [];
    const tint = (at) => {
      const [one, two] = shown.layers.map((weights) => weights.get(at) ?? 0);
      const span = spans[at];
      if (one > 0 && two > 0) {
        span.style.background = `linear-gradient(${page.tint(0, one)} 50%, ${page.tint(1, two)} 50%)`;
      } else span.style.background = one > 0 ? page.tint(0, one) : page.tint(1, two);
      span.classList.add("tinted");
      painted.push(span);
    };
    for (const weights of shown.layers) {
      for (const at of weights.keys()) if (page.paper || seen.has(chunkOf[at])) tint(at);
    }
    if (shown.token !== null && spans[shown.token]) {
      spans[shown.token].classList.add("current");
      painted.push(spans[shown.token]);
    }
  };

  const SAID = 0.001; // less is not worth a word

  // A token that is named, and may be out of sight: a click brings it there.
  const jump = (at) => {
    const button = page.element("button", { type: "button", title: "Show it in the text" });
    button.append(page.element("q", { dir: "auto" }, page.quoted(at)));
    button.addEventListener("click", () => reveal(at));
    return button;
  };

  const listed = (pairs) => {
    const most = pairs.filter(([, weight]) => weight >= SAID).slice(0, 4).flatMap(([at, weight], rank) => [
      rank ? ", " : " ",
      jump(at),
      ` (${at}) ${page.share(weight)}`,
    ]);
    if (most.length) return most;
    const { keys } = window.polyhead.data;
    return [keys?.least > 0 ? ` no token with ${page.share(keys.least)} or more` : " no token in particular"];
  };

  const phrase = (which, words, pairs) => {
    const name = page.element("b", {}, words);
    name.style.color = page.ink(which);
    return [name, ...listed(pairs), ". "];
  };

  // Pairs [words, [token, weight] ...] of what is shown of a token.
  const found = async (token) => {
    const { head, other, mode } = page.state;
    const [one, two] = await Promise.all([head, other ?? head].map(page.looksOf));
    if (other !== null) {
      const way = mode === "from" ? "from" : "to";
      const words = (place) => (way === "to" ? `${page.shortName(place)} looks at` : `${page.shortName(place)} is looked at by`);
      return [[words(head), one[way](token)], [words(other), two[way](token)]];
    }
    const nothing = ["", []];
    return [
      mode === "from" ? nothing : ["looks at", one.to(token)],
      mode === "to" ? nothing : ["is looked at by", one.from(token)],
    ];
  };

  const tell = async () => {
    const token = hovered ?? page.state.token;
    const reading = page.byId("reading");
    if (token === null) {
      shown = { token, layers: [] };
      reading.textContent = matchMedia("(hover: none)").matches
        ? "Touch a token: where does it look?"
        : "Point at a token, or step through the text with the arrow keys: where does it look?";
      return paint();
    }
    const { head, other } = page.state;
    const sides = await found(token);
    // Another token or head may have been chosen while this was decoded.
    if (token !== (hovered ?? page.state.token) || head !== page.state.head || other !== page.state.other) return;
    shown = { token, layers: sides.map(([, pairs]) => new Map(pairs)) };
    paint();
    const name = page.element("q", { dir: "auto" }, page.quoted(token));
    const parts = sides.flatMap(([words, pairs], which) => (words ? phrase(which, words, pairs) : []));
    reading.replaceChildren(name, ` (${token}) `, ...parts);
  };

  const modes = () => {
    const box = page.byId("modes");
    const choices = [["to", "where it looks"], ["from", "who looks at it"], ["both", "both"]];
    const { other, mode } = page.state;
    const made = choices.filter(([value]) => other === null || value !== "both").map(([value, words]) => {
      const input = page.element("input", { type: "radio", name: "mode", value });
      input.checked = value === mode || (other !== null && mode === "both" && value === "to");
      input.addEventListener("change", () => page.present({ mode: value }));
      return page.element("label", {}, input, words);
    });
    box.replaceChildren(box.firstElementChild, ...made);
  };

  // Into sight, moving nothing but the text's own window.
  const reveal = (token) => {
    const box = text.getBoundingClientRect();
    const spot = spans[token].getBoundingClientRect();
    if (spot.top < box.top || spot.bottom > box.bottom) {
      text.scrollTop += spot.top - box.top - box.height / 3;
    }
  };

  text.addEventListener("pointerover", (event) => {
    hovered = page.tokenOf(event);
    tell();
  });
  text.addEventListener("pointerleave", () => {
    hovered = null;
    tell();
  });
  // For stepping through it.
  page.tokenOf = (event) => {
    const span = event.target.closest?.(".token");
    return span ? Number(span.dataset.token) : null;
  };
  page.spans = () => spans;
  page.reveal = reveal;
  page.pointAt = (token) => {
    hovered = token;
    tell();
  };
  page.revealToken = () => page.state.token !== null && reveal(page.state.token);
  page.on("data", build);
  page.on("select", () => {
    modes();
    tell();
  });
  page.on("present", () => {
    modes();
    tell();
  });
  page.on("theme", () => {
    paint();
    tell();
  });
  page.on("paper", paint);
})();
