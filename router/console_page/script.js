"use strict";
// The console: asks the router once a second and draws what it says. All text goes in as text, never as markup.

const POLL_MS = 1000;
const ANSWER_MS_MAX = 5000;
const SVG = "http://www.w3.org/2000/svg";
const SOURCES = ["hbm", "dram", "peer", "nvme", "redis"];
const GAP = 0.01;      // a share of a request's time that is worth a bar though no phase has it

let chosen = "";       // the request whose path is to be shown; "" follows the newest one that is over
let shown = "";        // the one that is on the screen
let key = "";          // an admin's key, kept in this page alone

const at = (id) => document.getElementById(id);

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

function drawing(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  made.append(...children);
  return made;
}

function fill(id, ...children) { at(id).replaceChildren(...children); }
function say(id, text) { at(id).textContent = text; }
const empty = (text) => element("p", "empty", text);

// Figures in words.

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value < 0.0005) return `${Math.round(value * 1e6)} µs`;
  if (value < 0.01) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(value * 1e3)} ms`;
  if (value < 100) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return `${Math.round(value / 60)} min`;
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let number = 0;
  while (value >= 1000 && number < units.length - 1) { value /= 1000; number += 1; }
  return `${number ? value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0) : value} ${units[number]}`;
}

const count = (value) => value.toLocaleString("en");
const many = (value, one, more = `${one}s`) => `${count(value)} ${value === 1 ? one : more}`;
const percent = (share) => `${(share * 100).toFixed(share > 0.995 || share === 0 ? 0 : 1)} %`;
const sum = (counts) => Object.values(counts).reduce((total, value) => total + value, 0);
const clock = (wall) => new Date(wall * 1000).toLocaleTimeString("en-GB");

function table(heads, rows) {
  const cell = (name, [text, className]) => element(name, className || "", text);
  const head = element("tr", "", ...heads.map(([text, className]) => cell("th", [text, className])));
  const body = rows.map(({ cells, className }) => element("tr", className || "", ...cells.map((each) => cell("td", each))));
  return element("div", "scroll", element("table", "", element("thead", "", head), element("tbody", "", ...body)));
}

// What the router said, part by part.

function summary(data) {
  const decode = data.workers.filter((worker) => worker.role === "decode").length;
  const prefill = data.workers.length - decode;
  const others = data.routers ? `, ${many(data.routers, "other router")}` : ", no other router";
  const bus = data.bus ? "" : " · the cachebus does not answer";
  say("summary", `${data.ready ? "ready" : "not ready"} · ${prefill} prefill, ${decode} decode${others} · policy ${data.policy}${bus}`);
}

function tiles(data) {
  const { ttft, hits, requests } = data;
  say("ttft-median", seconds(ttft.median));
  say("ttft-p99", seconds(ttft.p99));
  say("ttft-note", ttft.requests ? `${many(ttft.requests, "request")} in ${Math.round(ttft.seconds / 60)} min` : "no request in the last minutes");
  say("hit-rate", hits.prompt_tokens ? percent(sum(hits.cached) / hits.prompt_tokens) : "–");
  say("hit-note", hits.prompt_tokens ? `of ${many(hits.prompt_tokens, "prompt token")}` : "no prompt in the last minutes");
  say("under-way", count(requests.under_way));
  say("under-way-note", `${requests.waiting ? `${count(requests.waiting)} of them queue, ` : ""}${count(requests.max)} at most`);
}

function chart(ttft) {
  if (!ttft.points.length) { fill("ttft-chart", empty("No first token came in the last minutes.")); return; }
  const width = Math.max(280, at("ttft-chart").clientWidth), height = 150, left = 52, bottom = 20, top = 8;
  const values = ttft.points.flatMap((point) => [point.median, point.p99]);
  const low = Math.floor(Math.log10(Math.min(...values))), high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...values))));
  const x = (age) => left + (width - left - 6) * (1 - age / ttft.seconds);
  const y = (value) => top + (height - top - bottom) * (1 - (Math.log10(value) - low) / (high - low));
  const svg = drawing("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", height,
    "aria-label": `Time to first token: median ${seconds(ttft.median)}, p99 ${seconds(ttft.p99)}` });
  for (let power = low; power <= high; power += 1) {
    const line = y(10 ** power);
    const text = drawing("text", { x: left - 6, y: line + 4, "text-anchor": "end" });
    text.textContent = seconds(10 ** power);
    svg.append(drawing("line", { class: "grid", x1: left, x2: width - 6, y1: line, y2: line }), text);
  }
  for (let minutes = 0; minutes <= ttft.seconds / 60; minutes += 1) {
    const text = drawing("text", { x: x(minutes * 60), y: height - 4, "text-anchor": minutes ? "middle" : "end" });
    text.textContent = minutes ? `-${minutes} min` : "now";
    svg.append(text);
  }
  for (const name of ["p99", "median"]) {
    // A step in which nothing came breaks the line.
    let path = "", before = null;
    for (const point of ttft.points) {
      path += `${before !== null && before - point.age <= ttft.step ? "L" : "M"}${x(point.age).toFixed(1)} ${y(point[name]).toFixed(1)}`;
      before = point.age;
      svg.append(drawing("circle", { class: `${name} dot`, cx: x(point.age), cy: y(point[name]), r: 2 }));
    }
    svg.append(drawing("path", { class: name, d: path }));
  }
  fill("ttft-chart", svg);
}

function hits({ prompt_tokens: prompt, cached }) {
  if (!prompt) { fill("hits", empty("No prompt was answered in the last minutes.")); return; }
  const known = SOURCES.map((source) => [source, cached[source] || 0]);
  const parts = [...known, ["computed", Math.max(0, prompt - sum(cached))]].filter(([, tokens]) => tokens);
  const bar = element("div", "bar");
  const rows = parts.map(([source, tokens]) => {
    const piece = element("i", `source-${source}`);
    piece.style.width = `${(100 * tokens) / prompt}%`;
    bar.append(piece);
    return element("div", "pair", element("span", "", element("i", `swatch source-${source}`), source), element("span", "", `${many(tokens, "token")} · ${percent(tokens / prompt)}`));
  });
  fill("hits", bar, ...rows);
}

function tiers(rows) {
  if (rows === null) { fill("tiers", empty("The cachebus did not say what its tiers hold.")); return; }
  if (!rows.length) { fill("tiers", empty("Nothing is stored yet.")); return; }
  fill("tiers", ...rows.flatMap((row) => {
    const used = row.bytes === null ? "" : ` · ${bytes(row.bytes)}${row.capacity ? ` of ${bytes(row.capacity)}` : ""}`;
    const line = element("div", "pair", element("span", "", row.tier), element("span", "", `${many(row.chunks, "chunk")}${used}`));
    if (!row.capacity) return [line];
    const piece = element("i", "");
    piece.style.width = `${Math.min(100, (100 * row.bytes) / row.capacity)}%`;
    return [line, element("div", "bar", piece)];
  }));
}

function workers(rows) {
  if (!rows.length) { fill("workers", empty("No worker has registered yet: start one with “headstart decode”.")); return; }
  const number = "number";
  const heads = [["worker"], ["role"], ["state"], ["requests", number], ["generating", number], ["backlog", number], ["chunks in HBM", number], ["model"]];
  fill("workers", table(heads, rows.map((row) => ({ cells: [
    [row.worker], [row.role], [row.state === "out" ? "out: gets nothing" : row.state, row.state], [count(row.requests), number],
    [count(row.running), number], [row.backlog ? seconds(row.backlog) : "–", number], [row.hbm_chunks === null ? "not known" : count(row.hbm_chunks), number], [row.model],
  ] }))));
}

function flights(found) {
  if (!found.count) { fill("flights", empty("No prefix is being computed that others could wait for.")); return; }
  const number = "number";
  const heads = [["by"], ["chunks", number], ["others waiting", number], ["thought to end in", number]];
  const rows = found.some.map((row) => ({ cells: [
    [row.leg === "prefill" ? "a prefill worker" : "its decode worker"], [count(row.chunks), number], [count(row.waiting), number], [row.seconds_left ? seconds(row.seconds_left) : "any moment", number],
  ] }));
  const more = found.count - found.some.length;
  fill("flights", table(heads, rows), ...(more ? [element("p", "note", `and ${count(more)} more`)] : []));
}

function sourcesOf(cached) {
  const parts = Object.entries(cached).map(([source, tokens]) => `${count(tokens)} ${source}`);
  return parts.join(", ") || "none";
}

function outcome(row) {
  if (row.under_way) return ["under way", "draining"];
  if (row.status === 499) return ["client left", "draining"];
  return [String(row.status), row.status < 400 ? "ready" : "failed"];
}

function last(rows) {
  if (!rows.length) { fill("last", empty("No request has come yet.")); return; }
  const number = "number";
  const tenants = rows.some((row) => row.tenant);
  const heads = [["at"], ...(tenants ? [["tenant"]] : []), ["outcome"], ["first token", number], ["in all", number], ["prompt", number], ["cached"], ["route"], ["worker"], ["model"]];
  fill("last", table(heads, rows.map((row) => {
    const button = element("button", "", clock(row.at));
    button.type = "button";
    button.title = row.id;
    button.addEventListener("click", () => { chosen = row.id; at("request-panel").scrollIntoView({ block: "nearest" }); poll(); });
    return { className: row.id === shown ? "chosen" : "", cells: [
      [button], ...(tenants ? [[row.tenant]] : []), outcome(row), [seconds(row.ttft), number], [seconds(row.seconds), number],
      [row.prompt_tokens ? count(row.prompt_tokens) : "–", number], [sourcesOf(row.cached)], [row.route === "none" ? "–" : row.route], [row.worker || "–"],
      [row.model || "–"],
    ] };
  })));
}

// One request's path.

const WORDS = { router: "in the router", receive: "receive the body", queue: "wait for a place", render: "render the prompt", wait: "wait for another's computing", prefill: "prefill", decode: "decode to first token", stream: "stream" };

function bars(request) {
  const found = [];
  let reached = 0;
  const gap = (until) => {
    if (until - reached > GAP * request.seconds) found.push({ name: "router", worker: "", from: reached, to: until, failed: "", cached: {} });
  };
  for (const phase of request.phases) {
    gap(phase.begun);
    const end = phase.ended === null ? request.seconds : phase.ended;
    const middle = phase.name === "decode" && phase.first_token !== null ? phase.first_token : end;
    found.push({ ...phase, from: phase.begun, to: middle, failed: middle === end ? phase.failed : "" });
    if (middle < end) found.push({ ...phase, name: "stream", from: middle, to: end, cached: {} });
    reached = Math.max(reached, end);
  }
  gap(request.seconds);
  return found;
}

function waterfall(request) {
  const found = bars(request), whole = Math.max(request.seconds, 1e-6, ...found.map((bar) => bar.to));
  const path = element("div", "path");
  for (const bar of found) {
    const piece = element("i", `phase-${bar.name}`);
    piece.style.left = `${(100 * bar.from) / whole}%`;
    piece.style.width = `${(100 * (bar.to - bar.from)) / whole}%`;
    const cached = sum(bar.cached) ? ` · cached: ${sourcesOf(bar.cached)}` : "";
    const failed = bar.failed ? element("b", "failed", ` ${bar.failed === "CancelledError" ? "broken off" : bar.failed}`) : null;
    const name = element("div", "name", WORDS[bar.name] || bar.name, element("span", "", `${bar.worker ? ` · ${bar.worker}` : ""}${cached}`), failed);
    name.title = name.textContent;
    const track = element("div", "track", piece);
    track.title = `from ${seconds(bar.from)} to ${seconds(bar.to)}`;
    path.append(element("div", "row", name, track, element("div", "seconds", seconds(bar.to - bar.from))));
  }
  return path;
}

function ways(request) {
  if (!request.ways.length) return [element("p", "note", "Its prompt was not looked up, so there was one way only.")];
  if (request.ways.every((way) => !way.total)) return [element("p", "note", "Its way was chosen by rule, so no seconds were compared.")];
  const number = "number";
  const heads = [["way"], ["queue", number], ["pull", number], ["compute", number], ["others wait", number], ["total", number], ["tokens to compute", number]];
  const rows = request.ways.map((way, place) => ({ className: place ? "" : "chosen", cells: [
    [way.prefill ? `${way.prefill}, then ${way.decode}` : `${way.decode} alone`], [seconds(way.queue), number], [seconds(way.pull), number],
    [seconds(way.compute), number], [seconds(way.others), number], [seconds(way.total), number], [count(way.tokens), number],
  ] }));
  return [element("h3", "", "The ways it had, the one chosen first, as they were thought to take"), table(heads, rows)];
}

function request(found) {
  if (!shown) { fill("request", empty("No request has come yet.")); return; }
  if (!found) { fill("request", empty("That request is not kept any longer: choose another one below.")); return; }
  const [text, className] = outcome(found);
  const follow = element("button", "", chosen ? "Show the newest again" : "Stay with this one");
  follow.type = "button";
  follow.addEventListener("click", () => { chosen = chosen ? "" : found.id; poll(); });
  const head = element("p", "", element("code", "", found.id), ` · ${clock(found.at)} · ${found.path} · `, element("b", className, text),
    ` · ${found.prompt_tokens ? many(found.prompt_tokens, "prompt token") : "prompt not counted"} · first token ${seconds(found.ttft)} · in all ${seconds(found.seconds)}`);
  const trace = found.trace ? element("p", "note", "trace ", element("code", "", found.trace)) : null;
  fill("request", head, ...(trace ? [trace] : []), waterfall(found), ...ways(found), element("p", "", follow));
}

// Asking.

async function ask() {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const query = shown ? `?request=${encodeURIComponent(shown)}` : "";
  const answer = await fetch(`console/data${query}`, { headers, cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS_MAX) });
  if (answer.status === 401 || answer.status === 403) {
    at("key-form").hidden = false;
    throw new Error(key ? "That key is not an admin's." : "This router asks for an admin's key.");
  }
  if (!answer.ok) throw new Error(`The router answered ${answer.status}.`);
  return answer.json();
}

function draw(data) {
  at("main").hidden = false;
  at("main").classList.remove("stale");
  at("problem").hidden = true;
  at("key-form").hidden = true;
  summary(data);
  tiles(data);
  chart(data.ttft);
  hits(data.hits);
  tiers(data.tiers);
  workers(data.workers);
  flights(data.flights);
  request(data.request);
  last(data.last);
}

let asking = false;

async function poll() {
  if (asking) return;
  asking = true;
  try {
    if (chosen) shown = chosen;
    let data = await ask();
    // The newest that is over has all of its path.
    const newest = (data.last.find((row) => !row.under_way) || data.last[0] || { id: "" }).id;
    if (!chosen && newest !== shown) {
      shown = newest;
      data = await ask();
    }
    draw(data);
  } catch (error) {
    const unreachable = error instanceof TypeError || error.name === "TimeoutError";
    say("problem", unreachable ? "The router can't be reached; what stands here is old. Asking again every second." : error.message);
    at("problem").hidden = false;
    at("main").classList.add("stale");
    say("summary", "no answer");
  } finally {
    asking = false;
  }
}

at("key-form").addEventListener("submit", (event) => { event.preventDefault(); key = at("key").value.trim(); at("key").value = ""; poll(); });
setInterval(() => { if (!document.hidden) poll(); }, POLL_MS);
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
poll();
