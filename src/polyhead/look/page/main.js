"use strict";
// The rest of the page, and its first view.
(() => {
  const { page } = window.polyhead;

  const lead = () => {
    const { data } = window.polyhead;
    page.byId("lead").textContent =
      `${data.model} read ${data.tokens.length} tokens with ${data.heads.length} attention ${data.heads.length === 1 ? "head" : "heads"}. ` +
      "Each square is one head: a row is a token, a column a token it looks at, and the stronger " +
      "the color, the more weight it puts there. Choose a head, and point at a word of the text." +
      (data.tokens.length > 16 ? "" : " Of so short a text all tokens are among the last 16: “local” is true of every head.");
  };

  const about = () => {
    const { head, other } = page.state;
    const { data } = window.polyhead;
    const one = (place, which) => {
      const paragraph = page.element("p", {}, page.kindChip(data.kinds[place]), " ", page.sentence(place));
      if (other !== null) {
        const name = page.element("b", {}, `${page.shortName(place)} `);
        name.style.color = page.ink(which);
        paragraph.prepend(name);
      }
      return paragraph;
    };
    page.byId("head-title").textContent =
      other === null ? page.headName(head) : `${page.shortName(head)} beside ${page.shortName(other)}`;
    const parts = [one(head, 0)];
    if (other !== null) parts.push(one(other, 1));
    else if (page.state.comparing) parts.push(page.element("p", { className: "note" }, "Choose the head to compare with."));
    page.byId("about").replaceChildren(...parts);
    page.byId("head").classList.toggle("comparing", other !== null);
    const button = page.byId("compare");
    button.setAttribute("aria-pressed", String(page.state.comparing));
    button.textContent = page.state.comparing ? "Stop comparing" : "Compare";
  };

  // How much of what the head does the text can show.
  const kept = () => {
    const { keys } = window.polyhead.data;
    const { head, other } = page.state;
    const shares = [head, other].filter((place) => place !== null);
    let says = "";
    if (keys) {
      const which = keys.least > 0 ? `looks of ${page.share(keys.least)} or more` : `the ${keys.given} strongest looks of each token`;
      const held = shares.map((place) => `${page.share(keys.held[place])} of the weight of ${page.shortName(place)}`);
      says = `Shown are ${which}: ${held.join(", ")}.`;
    } else if (page.pooled()) says = "The text is too long for this file to say which token looks at which.";
    page.byId("kept").textContent = says;
  };

  // What the file holds of what was seen, and what it had no room for.
  const held = () => {
    const { maps, keys, tokens, left_out: leftOut } = window.polyhead.data;
    const n = maps.edges.length - 1;
    const parts = [
      page.pooled()
        ? `Maps of ${n} × ${n} cells, each the mean over about ${Math.round(tokens.length / n)} × ${Math.round(tokens.length / n)} tokens, in ${maps.levels} steps.`
        : `Maps of every weight, in ${maps.levels} steps.`,
    ];
    if (keys) {
      const mean = keys.held.reduce((sum, share) => sum + share, 0) / keys.held.length;
      const least = keys.least > 0 ? ` that get at least ${page.share(keys.least)} of its weight` : "";
      parts.push(
        `Of each token, the text shows the at most ${keys.given} strongest looks${least}; ` +
          `they hold ${page.share(mean)} of all weight, each rounded to one of ${keys.levels} steps.`,
      );
      if (keys.least > 0) parts.push("Weaker ones had no room in a file of this size.");
    } else if (page.pooled()) {
      parts.push("The text is too long for a file of this size to say which tokens look at which.");
    }
    if (leftOut.length) parts.push(`Left out, as they look at another text: ${leftOut.join(", ")}.`);
    page.byId("held").textContent = parts.join(" ");
  };

  // The head that says most: of the rarest habit that is there, the one that has it most.
  const telling = () => {
    const { data } = window.polyhead;
    const best = (kind, name) => {
      const of = data.heads.map((_, place) => place).filter((place) => data.kinds[place] === kind);
      return of.sort((one, two) => page.numberOf(name, two) - page.numberOf(name, one))[0];
    };
    return best("induction", "mass_induction") ?? best("previous token", "mass_previous") ??
      best("local", "mass_recent") ?? 0;
  };

  // A token near the top whose look is of its head's kind: not at the first token, not at itself.
  const tellingToken = async (head) => {
    const looks = await page.looksOf(head);
    const { tokens, kinds } = window.polyhead.data;
    const fits = {
      induction: (token, key) => key <= token && tokens[key - 1] === tokens[token],
      "previous token": (token, key) => key === token - 1,
    }[kinds[head]] ?? (() => true);
    let [best, most] = [null, 0];
    for (let token = 1; token < Math.min(tokens.length, 250); token++) {
      for (const [key, weight] of looks.to(token)) {
        const says = key !== 0 && key !== token && tokens[token].trim().length > 2 && fits(token, key);
        if (says && weight > most) [best, most] = [token, weight];
      }
    }
    return best;
  };

  let linked = null; // what the address asked for when the page was opened
  window.polyhead.show = (payload) => {
    const before = window.polyhead.data && window.polyhead.selection();
    window.polyhead.data = payload;
    const { state } = page;
    if (before) {
      const kept = page.place(before.layer, before.head);
      const other = before.other ? page.place(before.other.layer, before.other.head) : -1;
      state.head = kept < 0 ? telling() : kept;
      state.other = kept < 0 || other < 0 ? null : other;
      if (!(state.token < payload.tokens.length)) state.token = null;
    } else {
      linked = page.linked();
      Object.assign(state, linked ?? { head: telling() });
    }
    lead();
    held();
    page.emit("data");
    page.emit("select");
    page.announce();
  };

  page.on("select", about);
  page.on("select", kept);
  page.on("theme", about);
  page.on("picked", () => {
    if (matchMedia("(max-width: 960px)").matches) page.byId("head").scrollIntoView();
  });
  page.on("enter-text", () => page.focusText());
  page.byId("compare").addEventListener("click", () => {
    const { comparing } = page.state;
    page.choose({ comparing: !comparing, other: null });
  });
  page.byId("back").addEventListener("click", () => {
    page.focusGrid();
  });

  const start = async () => {
    if (!("DecompressionStream" in window)) {
      page.byId("lead").textContent = "This browser is too old for the page: it cannot inflate its data.";
      return;
    }
    window.polyhead.show(JSON.parse(page.byId("data").textContent));
    if (!linked) {
      const { head } = page.state;
      const token = await tellingToken(head);
      if (page.state.head === head && page.state.token === null) page.choose({ token });
    }
    await page.drawn; // the text has its place when the map has
    page.revealToken();
  };
  start();
})();
