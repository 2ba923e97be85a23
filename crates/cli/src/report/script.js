"use strict";
// The page is whole without this: it adds the filter over all replies, and shows the arm that is
// pointed at in plot and table.
(() => {
  const all = document.querySelector(".all");
  const form = all && all.querySelector(".filter");
  if (form) {
    const rows = [...all.querySelectorAll(".pair")].map((row) => ({ row, text: row.textContent.toLowerCase() }));
    const apply = () => {
      const text = form.elements.text.value.trim().toLowerCase();
      const label = form.elements.label.value;
      const category = form.elements.category;
      const pick = document.querySelector(".pick:checked");
      const arm = pick ? pick.value : "0";
      let shown = 0;
      for (const { row, text: words } of rows) {
        const keep =
          (!text || words.includes(text)) &&
          (!label || row.dataset.label === label) &&
          (category.selectedIndex === 0 || row.dataset.category === category.value) &&
          (!form.elements.differ.checked || row.dataset.differs.split(" ").includes(arm));
        row.hidden = !keep;
        shown += keep;
      }
      form.querySelector("output").textContent = shown + " shown";
    };
    form.hidden = false;
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const pick of document.querySelectorAll(".pick")) pick.addEventListener("change", apply);
  }

  const parts = document.querySelectorAll("[data-arm]");
  for (const part of parts) {
    const set = (on) => {
      for (const drawing of document.querySelectorAll(".tradeoff")) drawing.classList.toggle("pointed", on);
      for (const other of parts) other.classList.toggle("on", on && other.dataset.arm === part.dataset.arm);
    };
    part.addEventListener("mouseenter", () => set(true));
    part.addEventListener("mouseleave", () => set(false));
  }
})();
