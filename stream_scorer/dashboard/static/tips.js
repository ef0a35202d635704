// Tooltips for terms: on hover, on focus and on tap; placed inside the window. Also fills the list of words.
import { WORDS } from "./words.js";

const GAP = 8;

export function setUpTips() {
  const tip = document.getElementById("tip");
  const show = (target) => {
    const [name, text] = WORDS[target.dataset.term];
    const strong = Object.assign(document.createElement("strong"), { textContent: name });
    tip.replaceChildren(strong, text);
    tip.hidden = false;
    const at = target.getBoundingClientRect();
    const { width, height } = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    const left = Math.max(GAP, Math.min(at.left, room - width - GAP));
    const above = at.bottom + GAP + height > window.innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${above ? at.top - height - GAP : at.bottom + GAP}px`;
    target.setAttribute("aria-describedby", "tip");
  };
  const hide = () => {
    tip.hidden = true;
  };
  const term = (event) => (event.target instanceof Element ? event.target.closest("[data-term]") : null);
  for (const kind of ["pointerover", "focusin", "click"]) {
    document.addEventListener(kind, (event) => (term(event) ? show(term(event)) : kind !== "focusin" && hide()));
  }
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());

  const list = document.getElementById("glossary");
  for (const [name, text] of Object.values(WORDS)) {
    const item = document.createElement("div");
    item.append(
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: text }),
    );
    list.append(item);
  }
}
