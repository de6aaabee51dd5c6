"use strict";
// The live page: it speaks the same interface as every client, and loads nothing from elsewhere.
const by = (id) => document.getElementById(id);
const cards = new Map();
const clips = new Map();
const PICTURES = ["input_reference", "last_reference"];
let models = [];

function key() { return sessionStorage.getItem("key") || ""; }

async function call(path, options = {}) {
  const headers = { ...(options.headers || {}) };
  if (key()) headers.authorization = `Bearer ${key()}`;
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) by("key-label").hidden = false;
  if (response.ok) return response;
  let text = `${response.status}`;
  try { text = (await response.json()).error.message; } catch { /* no JSON: the status says it */ }
  throw new Error(text);
}

function body() {
  const data = { prompt: by("prompt").value };
  if (models.length > 1 || by("model").value) data.model = by("model").value;
  if (by("size").value) data.size = by("size").value;
  if (by("mode").value) data.mode = by("mode").value;
  for (const name of ["num_frames", "num_inference_steps", "guidance_scale", "seed", "delta"]) {
    if (by(name).value !== "") data[name] = Number(by(name).value);
  }
  const chosen = PICTURES.filter((name) => !by(name).parentElement.hidden && by(name).files.length);
  if (!chosen.length) return { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(data) };
  const form = new FormData();
  for (const [name, value] of Object.entries(data)) form.append(name, value);
  for (const name of chosen) form.append(name, by(name).files[0]);
  return { method: "POST", body: form };
}

async function tried(work) {
  by("problem").hidden = true;
  try { await work(); } catch (error) {
    by("problem").textContent = error.message;
    by("problem").hidden = false;
  }
}

function showModel() {
  const model = models.find((each) => each.id === by("model").value);
  const about = model ? model.dvdquant : {};
  const modes = about.modes || ["switch", "a4", "a8"];
  by("mode").replaceChildren(...modes.map((mode) => new Option(mode, mode)));
  by("words").hidden = !about.words;
  by("words").textContent = about.words ? `Words: ${about.words}` : "";
  if (about.example && !by("prompt").value) by("prompt").value = about.example;
  if (about.width) by("size").placeholder = `${about.width.default}x${about.height.default}`;
  for (const name of PICTURES) by(name).parentElement.hidden = !about.pictures || about.pictures[name] === "none";
  if (about.frames) by("num_frames").placeholder = about.frames.default;
}

async function loadModels() {
  const listed = (await (await call("/v1/models")).json()).data;
  models = listed;
  const chosen = by("model").value;
  by("model").replaceChildren(...listed.map((model) => new Option(model.id, model.id)));
  if (chosen) by("model").value = chosen;
  showModel();
  return listed.every((model) => model.dvdquant.family);
}

function show(video) {
  let card = cards.get(video.id);
  if (!card) {
    card = by("card").content.firstElementChild.cloneNode(true);
    card.dataset.created = video.created_at;
    card.querySelector(".cancel").onclick = () => tried(() => call(`/v1/videos/${video.id}/cancel`, { method: "POST" }));
    card.querySelector(".delete").onclick = () => tried(async () => {
      await call(`/v1/videos/${video.id}`, { method: "DELETE" });
      forget(video.id);
    });
    cards.set(video.id, card);
    by("videos").prepend(card);
  }
  const ours = video.dvdquant;
  card.querySelector(".prompt").textContent = video.prompt;
  const place = video.status === "queued" && ours.queue_position !== null ? `${ours.queue_position} before it` : "";
  const summary = ours.summary ? `${ours.summary.seconds} s, ${ours.summary.average_bits} bits on average` : "";
  const facts = [video.status, place, video.model, video.size, `${video.seconds} s`, summary, ours.attempts > 1 ? `attempt ${ours.attempts}` : ""];
  card.querySelector(".facts").textContent = facts.filter(Boolean).join(" · ");
  const steps = card.querySelector(".steps");
  steps.setAttribute("aria-label", `bits of each step: ${ours.bits.map((bits) => bits ?? "skipped").join(" ")}`);
  while (steps.children.length < ours.steps) steps.append(document.createElement("i"));
  [...steps.children].forEach((bar, i) => {
    bar.className = i < ours.bits.length ? (ours.bits[i] === null ? "bs" : `b${ours.bits[i]}`) : "";
  });
  const ended = video.status === "completed" || video.status === "failed";
  card.querySelector(".percent").textContent = video.status === "completed" ? "" : video.status === "failed" ? "failed" : `${video.progress} %`;
  card.querySelector(".cancel").hidden = ended;
  card.querySelector(".error").hidden = !video.error;
  if (video.error) card.querySelector(".error").textContent = video.error.message;
  if (video.status === "completed" && !clips.has(video.id)) loadClip(video.id, card);
  card.dataset.status = video.status;
}

async function loadClip(id, card) {
  clips.set(id, null);
  try {
    const place = URL.createObjectURL(await (await call(`/v1/videos/${id}/content`)).blob());
    clips.set(id, place);
    const player = card.querySelector("video");
    player.src = place;
    player.hidden = false;
    player.play().catch(() => {});
    const save = card.querySelector(".save");
    save.href = place;
    save.download = `${id}.mp4`;
    save.hidden = false;
  } catch { clips.delete(id); }
}

function forget(id) {
  if (clips.get(id)) URL.revokeObjectURL(clips.get(id));
  clips.delete(id);
  cards.get(id)?.remove();
  cards.delete(id);
}

async function refresh() {
  const videos = (await (await call("/v1/videos?limit=20")).json()).data;
  for (const video of videos.reverse()) show(video);
  const listed = new Set(videos.map((video) => video.id));
  for (const id of [...cards.keys()]) if (!listed.has(id)) forget(id);
  by("empty").hidden = cards.size > 0;
  const busy = videos.filter((video) => video.status === "in_progress").length;
  const waiting = videos.filter((video) => video.status === "queued").length;
  return { busy, waiting };
}

async function watch() {
  let known = false;
  for (;;) {
    let pause = 2000;
    try {
      const health = await (await fetch("/health")).json();
      const workers = Object.values(health.workers);
      const ready = workers.filter((state) => state === "ready").length;
      if (!known && ready) known = await loadModels();
      const { busy, waiting } = await refresh();
      const text = health.draining ? "stopping" : ready ? `${ready} of ${workers.length} workers ready` : "loading the models";
      by("state").textContent = `${text} · ${busy} running · ${waiting} waiting`;
      if (busy || waiting) pause = 250;
    } catch (error) { by("state").textContent = error.message === "Failed to fetch" ? "the server does not answer" : error.message; }
    await new Promise((done) => setTimeout(done, pause));
  }
}

by("model").onchange = showModel;
by("key").onchange = () => { sessionStorage.setItem("key", by("key").value); };
by("form").onsubmit = (event) => {
  event.preventDefault();
  tried(async () => { await call("/v1/videos", body()); await refresh(); });
};
by("ask").onclick = () => tried(async () => {
  const plan = await (await call("/preflight", body())).json();
  const cost = Object.entries(plan.transformer_seconds_by_bits).map(([bits, seconds]) => `${seconds} s at ${bits} bits`);
  const rows = {
    Clip: `${plan.num_frames} frames, ${plan.size}, ${plan.seconds} s`,
    Steps: `${plan.num_inference_steps} (${plan.transformer_calls} calls), ${plan.mode}`,
    "Runs on": `${plan.executed.backend || "?"}, ${plan.executed.device || "?"}`,
    Cost: cost.join(", ") || "not timed yet",
    Waiting: `${plan.queue.waiting} of ${plan.queue.limit}`,
  };
  by("plan").replaceChildren(...Object.entries(rows).flatMap(([name, value]) => {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  }));
  by("plan").hidden = false;
});
watch();
