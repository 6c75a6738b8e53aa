// Shows a token's numbers without a mouse: by tap, or by Tab and the arrow keys.
const details = document.getElementById("details");
const tokenOf = (event) => event.target.closest(".rollout code > span");
const showNumbers = (token) => {
  if (!token) return;
  details.hidden = false;
  details.textContent = `“${token.textContent}”  ${token.title} (nats)`;
};
document.addEventListener("click", (event) => showNumbers(tokenOf(event)));
document.addEventListener("focusin", (event) => showNumbers(tokenOf(event)));
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
drawCharts();
startBrowsers();

// The page of an unfinished run reloads itself, and keeps open what the reader has opened.
const live = document.getElementById("live");
const again = Number(document.body.dataset.again);
const STATES = { starting: "Starting", stopped: "The run was stopped", failed: "The run failed" };
const running = () => `${STATES[live.dataset.state] ?? "Running"}; this page updates every ${again} s.`;
let shown = null; // the ETag of the version on the page
const say = (text) => {
  live.textContent = text;
  live.hidden = false;
};
const time = () => new Date().toLocaleTimeString();

async function update() {
  try {
    const answer = await fetch(location.href, { cache: "no-cache" });
    if (!answer.ok) throw new Error(String(answer.status));
    const tag = answer.headers.get("ETag");
    const reading = document.activeElement?.closest(".browser, .chart"); // don't take the focus away
    if (tag !== shown && !reading) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = [...document.querySelectorAll("details")].map((each) => each.open);
      document.querySelector("main").replaceWith(fresh.querySelector("main"));
      document.querySelectorAll("details").forEach((each, index) => { each.open = open[index] ?? false; });
      drawCharts();
      startBrowsers();
      shown = tag;
      live.dataset.state = fresh.getElementById("live").dataset.state;
      if (!fresh.body.dataset.again) return say(`${STATES[live.dataset.state] ?? "The run is finished"}. Last update ${time()}.`);
      say(`${running()} Last change ${time()}.`);
    }
  } catch {
    say(`The API can't be reached since ${time()}; this page shows the run's last known state.`);
  }
  setTimeout(update, again * 1000);
}
if (again) {
  say(running());
  setTimeout(update, again * 1000);
}
