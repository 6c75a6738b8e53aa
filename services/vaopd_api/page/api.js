// Calls the scoring API at the page's own origin. Every failure becomes a Problem with a message for people.

import { recall, remember } from "./dom.js";

let key = recall("sessionStorage", "vaopd.key") ?? "";

export function setKey(value) {
  key = value.trim();
  remember("sessionStorage", "vaopd.key", key);
}
export const getKey = () => key;

/** `status` 0: there was no answer. `field`: the key of the request that caused the problem, if one did. */
export class Problem extends Error {
  constructor(status, detail, field = null, requestId = null) {
    super(detail);
    Object.assign(this, { status, field, requestId });
  }
}

async function ask(path, { body, signal } = {}) {
  const headers = { Accept: "application/json, image/png" };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "The API can't be reached. Is it still running, and are you online?");
  }
  if (answer.ok) return answer;
  let problem = {};
  try {
    problem = await answer.json();
  } catch {
    // A proxy between page and API answered; only the status is known.
  }
  throw new Problem(
    answer.status,
    problem.detail ?? `The API answered ${answer.status}.`,
    problem.field ?? null,
    problem.request_id ?? null,
  );
}

const json = async (path, options) => (await ask(path, options)).json();

export const teachers = async () => (await json("v1/teachers")).teachers;
export const students = async () => (await json("v1/students")).students;
export const score = (body, signal) => json("v1/score", { body, signal });
export const regions = (body, signal) => json("v1/regions", { body, signal });
export const sample = (body, signal) => json("v1/sample", { body, signal });
export const runs = async () => (await json("v1/runs")).runs;
export const file = async (path) => (await ask(path)).blob();
export const degraded = async (body, signal) => (await ask("v1/degrade", { body, signal })).blob();
export const examples = () => json("page/examples/examples.json");

/** Returns the problem as a sentence, with advice where there is some. */
export function explain(problem) {
  const advice = {
    401: "Type a valid API key into the field at the top of the form.",
    403: "This key may not do that; ask the service's operator.",
    413: "Choose a smaller image or fewer responses.",
    429: "Wait a moment, then score again.",
    503: "If it has just been started, it is still loading its model; try again in a moment.",
  }[problem.status];
  const sentence = problem.message.charAt(0).toUpperCase() + problem.message.slice(1);
  return [/[.!?]$/.test(sentence) ? sentence : `${sentence}.`, advice].filter(Boolean).join(" ");
}
