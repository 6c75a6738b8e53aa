// A token's numbers, for those who can't hover: by tap, or by Tab and the arrow keys.
const details = document.getElementById("details");
const tell = (token) => {
  details.hidden = false;
  details.textContent = `“${token.textContent}”  ${token.title} (nats)`;
};
for (const text of document.querySelectorAll(".rollout code")) {
  if (text.firstElementChild) text.firstElementChild.tabIndex = 0;
  text.addEventListener("click", (event) => event.target.title && tell(event.target));
  text.addEventListener("focusin", (event) => tell(event.target));
  text.addEventListener("keydown", (event) => {
    const to = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    const next = to && event.target[to];
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    event.preventDefault();
  });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") details.hidden = true; });
