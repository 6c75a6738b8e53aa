// A token's numbers, for those who can't hover: by tap, or by Tab and the arrow keys.
const details = document.getElementById("details");
const tokenOf = (event) => event.target.closest(".rollout code > span");
const tell = (token) => {
  if (!token) return;
  details.hidden = false;
  details.textContent = `“${token.textContent}”  ${token.title} (nats)`;
};
const makeReachable = () => {
  for (const text of document.querySelectorAll(".rollout code"))
    if (text.firstElementChild) text.firstElementChild.tabIndex = 0;
};
document.addEventListener("click", (event) => tell(tokenOf(event)));
document.addEventListener("focusin", (event) => tell(tokenOf(event)));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") details.hidden = true;
  const to = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const next = to && tokenOf(event)?.[to];
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  event.preventDefault();
});
makeReachable();

// The page of a run that goes on asks for itself again, and shows what is new where the reader is.
const live = document.getElementById("live");
const again = Number(document.body.dataset.again);
let shown = null; // the ETag of what is on show
const say = (words) => {
  live.textContent = words;
  live.hidden = false;
};
const time = () => new Date().toLocaleTimeString();

async function look() {
  try {
    const answer = await fetch(location.href, { cache: "no-cache" });
    if (!answer.ok) throw new Error(String(answer.status));
    const tag = answer.headers.get("ETag");
    const reading = document.activeElement?.closest(".rollout"); // focus is not taken away
    if (tag !== shown && !reading) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = [...document.querySelectorAll("details")].map((each) => each.open);
      document.querySelector("main").replaceWith(fresh.querySelector("main"));
      document.querySelectorAll("details").forEach((each, index) => { each.open = open[index] ?? false; });
      makeReachable();
      shown = tag;
      if (!fresh.body.dataset.again) return say(`The run is finished; last looked at ${time()}.`);
      say(`The run goes on: this page follows it. Last change ${time()}.`);
    }
  } catch {
    say(`The API can't be reached since ${time()}; this is how the run stood before.`);
  }
  setTimeout(look, again * 1000);
}
if (again) {
  say("The run goes on: this page follows it.");
  setTimeout(look, again * 1000);
}
