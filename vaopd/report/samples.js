// The rollouts of all recorded steps: filtered, sorted, a few groups at a time, their tokens coloured.
// The data stand in the JSON of each .browser; `rollouts.py` makes them.
const MORE = 3; // groups of each step that are added at a time
const FULL_COLOUR = { VA: 1000, "view divergence": 1000, "expected VA": 1000, KL: 1000 }; // thousandths of a nat; rollouts.py
const NAMES = ["VA", "view divergence", "expected VA", "teacher", "degraded", "student", "KL"]; // the order in which they are shown
const SIGNS = { right: "✓", wrong: "✗" };
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length / 1000;

const nameStep = (step) => (step ? `After ${step} steps` : "Before the first step: the initial student");

function startBrowser(browser) {
  const { totals, groups } = JSON.parse(browser.querySelector("script").textContent);
  const steps = [...new Set(groups.map((group) => group.step))];
  const rollouts = groups.flatMap((group) => group.rollouts);
  const present = (name) => rollouts.some((rollout) => name in rollout.numbers);
  const choose = (label, options) => {
    const select = element("select", {}, ...options.map(([value, text]) => element("option", { value }, text)));
    return [element("label", {}, `${label} `, select), select];
  };
  const least = (label) => {
    const input = element("input", { type: "number", step: "0.05", placeholder: "any" });
    return [element("label", {}, `${label} `, input), input];
  };
  const ends = steps.length > 2 ? [["ends", "first and last"]] : [];
  const [stepLabel, step] = choose("step", [...ends, ["", "all"], ...steps.map((each) => [String(each), String(each)])]);
  const verdicts = [...new Set(rollouts.map((rollout) => rollout.verdict))].filter(Boolean);
  const [verdictLabel, verdict] = choose("answer", [["", "any"], ...verdicts.map((each) => [each, each])]);
  const [vaLabel, va] = least("mean VA from");
  const [klLabel, kl] = least("mean KL from");
  const numbers = Object.keys(FULL_COLOUR).filter(present);
  const [sortLabel, sort] = choose("order", [["", "as recorded"], ...numbers.map((name) => [name, `largest ${name} first`])]);
  const [colourLabel, colour] = choose("colour", numbers.map((name) => [name, name]));
  const said = element("p", { className: "note" });
  said.setAttribute("role", "status");
  const list = element("div");
  const more = element("button", { type: "button" }, "Show more");
  let shown = MORE;

  const matches = (rollout) =>
    (!verdict.value || rollout.verdict === verdict.value) &&
    (va.value === "" || mean(rollout.numbers.VA) >= Number(va.value)) &&
    (kl.value === "" || (rollout.numbers.KL && mean(rollout.numbers.KL) >= Number(kl.value)));
  const rank = (group) => Math.max(...group.rollouts.map((rollout) => mean(rollout.numbers[sort.value] ?? [0])));
  const draw = () => {
    const wanted = steps.filter((each, index) =>
      step.value === "ends" ? index === 0 || index === steps.length - 1 : !step.value || String(each) === step.value,
    );
    const found = groups
      .filter((group) => wanted.includes(group.step))
      .map((group) => ({ ...group, rollouts: group.rollouts.filter(matches) }))
      .filter((group) => group.rollouts.length);
    const count = found.reduce((sum, group) => sum + group.rollouts.length, 0);
    const total = wanted.reduce((sum, each) => sum + totals[each], 0);
    const held = groups.filter((group) => wanted.includes(group.step)).length;
    said.textContent = `${count} rollouts of ${found.length} groups match.${held < total ? ` The page holds ${held} of the ${total} groups of these steps; samples.jsonl has all.` : ""}`;
    let left = false;
    list.replaceChildren(
      ...wanted.flatMap((each) => {
        const own = found.filter((group) => group.step === each);
        if (sort.value) own.sort((a, b) => rank(b) - rank(a));
        left ||= own.length > shown;
        return own.length ? [element("h4", {}, nameStep(each)), ...own.slice(0, shown).map((group) => drawGroup(group, colour.value))] : [];
      }),
    );
    more.hidden = !left;
  };
  const again = () => {
    shown = MORE;
    draw();
  };
  for (const control of [step, verdict, va, kl, sort, colour]) control.addEventListener("input", again);
  more.addEventListener("click", () => {
    shown += MORE;
    draw();
  });
  const filters = [stepLabel, verdicts.length ? verdictLabel : null, vaLabel, present("KL") ? klLabel : null, sortLabel, numbers.length > 1 ? colourLabel : null];
  browser.append(element("div", { className: "filters" }, ...filters), said, list, more);
  draw();
}

function drawGroup(group, colour) {
  const pictures = group.pictures.map(({ name, url }) =>
    element("figure", {}, element("img", { alt: name, src: url }), element("figcaption", {}, name)),
  );
  const question = element("p", {}, element("b", { dir: "auto" }, group.question), " Answer: ", element("span", { dir: "auto" }, group.answer));
  return element(
    "section",
    { className: "group" },
    element("div", { className: "pictures" }, ...pictures),
    element("div", {}, question, ...group.rollouts.map((rollout) => drawRollout(rollout, colour))),
  );
}

function drawRollout({ tokens, weight, verdict, high, numbers }, colour) {
  const names = NAMES.filter((name) => name in numbers);
  const spans = tokens.map((text, index) => {
    const title = names.map((name) => `${name} ${(numbers[name][index] / 1000).toFixed(3)}`).join(", ");
    const span = element("span", { className: high.includes(index) ? "high" : "", title }, text);
    const share = Math.min(1, Math.max(0, (numbers[colour]?.[index] ?? 0) / FULL_COLOUR[colour]));
    span.style.background = `color-mix(in srgb, var(--heat) ${(100 * share).toFixed()}%, transparent)`;
    return span;
  });
  if (spans[0]) spans[0].tabIndex = 0;
  const sign = verdict ? element("b", { className: verdict.replace(" ", "-"), title: verdict }, SIGNS[verdict] ?? "?") : null;
  const filled = element("i");
  filled.style.width = `${100 * weight}%`;
  const bar = element("span", { className: "weight", title: `rollout weight ${weight.toFixed(3)}` }, filled);
  const facts = [`VA ${mean(numbers.VA).toFixed(3)}`, numbers.KL && `KL ${mean(numbers.KL).toFixed(3)}`].filter(Boolean).join(", ");
  return element("p", { className: "rollout" }, sign, " ", bar, " ", element("code", { dir: "auto" }, ...spans), " ", element("span", { className: "note" }, facts));
}

function startBrowsers() {
  document.querySelectorAll(".browser").forEach(startBrowser);
}
