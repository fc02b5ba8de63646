"use strict";
// The page of a model that is served. A conversation is a tree of messages, which this browser
// keeps: what is edited or answered anew gets a sibling, and `at` is the child that is shown.
// Whatever a user or a model writes becomes text nodes, never markup.

const $ = (id) => document.getElementById(id);
const KEPT = "scalegpt/talk/"; // each conversation has a key, so tabs do not overwrite each other's
const OPTIONS = {
  temperature: "Temperature", top_k: "Top k", top_p: "Top p", min_p: "Min p",
  repetition_penalty: "Repetition penalty", max_tokens: "Max tokens", seed: "Seed",
};
const TOUCH = matchMedia("(pointer: coarse)").matches;
let server = null; // what GET props says
let needsKey = false;
let talks = [];
let talk = null; // the one shown, of {id, title, system, draft, changed, children, at}
let settings = {};
let editing = null; // a message
let looking = false; // at tokens
const running = new Map(); // conversation -> {message, controller} of the answer being written
const drawn = new WeakMap(); // answer -> {from: characters before its first known token, tokens}
const boxes = new Map(); // message shown -> its element

const isChat = () => server?.kind !== "base";
const isMark = ({ bytes }) => bytes?.length === 0;

function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function button(textContent, title, onclick) {
  return element("button", { textContent, title, onclick });
}

// Conversations

function path(root) {
  const messages = [];
  for (let node = root; node.children.length; messages.push(node)) node = node.children[node.at];
  return messages;
}

function before(root, message) {
  const messages = path(root);
  return messages.slice(0, messages.indexOf(message));
}

function add(parent, message) {
  const made = { children: [], at: 0, ...message };
  parent.at = parent.children.push(made) - 1;
  return made;
}

function created(system = "") {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2);
  return { id, title: "", system, draft: "", children: [], at: 0 };
}

function load() {
  try {
    const keys = Object.keys(localStorage).filter((key) => key.startsWith(KEPT));
    talks = keys.map((key) => JSON.parse(localStorage[key])).sort((a, b) => b.changed - a.changed);
    settings = JSON.parse(localStorage["scalegpt/settings"] ?? "{}");
    looking = localStorage["scalegpt/looking"] === "true";
  } catch (error) {
    notice(`This browser keeps no conversations: ${error.message}`);
  }
}

function save(root) {
  if (root.deleted) return;
  root.changed = Date.now();
  keep(KEPT + root.id, JSON.stringify(root));
  if (talks.includes(root)) return;
  talks.unshift(root);
  showTalks();
}

function keep(key, value) {
  try {
    localStorage[key] = value;
  } catch {
    notice("This browser has no room for more: export conversations, then delete some.");
  }
}

function open(root) {
  [talk, editing] = [root, null];
  $("draft").value = root.draft;
  document.body.classList.remove("side");
  showSettings();
  show();
  $("log").scrollTop = $("log").scrollHeight;
  if (!TOUCH) $("draft").focus();
}

function said(root, messages) {
  const system = root.system.trim() ? [{ role: "system", content: root.system }] : [];
  return [...system, ...messages.map(({ role, content }) => ({ role, content }))];
}

// The server

async function ask(where, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (sessionStorage.key) headers.Authorization = `Bearer ${sessionStorage.key}`;
  const how = body ? { method: "POST", headers, signal, body: JSON.stringify(body) } : { headers };
  const response = await fetch(where, how).catch((error) => {
    throw signal?.aborted ? error : new Error("The server does not answer.");
  });
  if (response.ok) return response;
  if ((needsKey ||= response.status === 401)) showSettings();
  const reason = (await response.json().catch(() => null))?.error?.message;
  throw new Error(reason ?? `The server said ${response.status} ${response.statusText}`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part; !(part = await reader.read()).done; ) {
    const lines = (text + part.value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:") || line.endsWith("[DONE]")) continue;
      const event = JSON.parse(line.slice(5));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function request(root, message) {
  const parents = before(root, message);
  const { from, tokens } = drawn.get(message);
  const body = { stream: true, stream_options: { include_usage: true }, logprobs: true };
  Object.assign(body, { top_logprobs: 5 }, settings);
  // An answer is written anew with another seed, and again the same in the same place.
  if ("seed" in settings) body.seed += (parents.at(-1) ?? root).children.indexOf(message);
  // Of a text that fills the model, the server drops the beginning, but never of what is written.
  const isShort = isChat() || tokens.length < server.block_size / 2;
  if (tokens.length && !from && isShort) body.answer_ids = tokens.map(({ id }) => id);
  if (isChat()) return { ...body, messages: said(root, [...parents, message]) };
  const text = [...parents, ...(body.answer_ids ? [] : [message])].map(({ content }) => content);
  return { ...body, prompt: text.join("") };
}

async function generate(root, message) {
  running.get(root)?.controller.abort();
  const mine = { message, controller: new AbortController() };
  running.set(root, mine);
  if (!drawn.has(message)) drawn.set(message, { from: message.content.length, tokens: [] });
  const { tokens } = drawn.get(message);
  if (tokens.length && isMark(tokens.at(-1))) tokens.pop(); // it goes on after its end
  message.finish = message.error = null;
  save(root);
  show();
  let first = null;
  try {
    const where = isChat() ? "v1/chat/completions" : "v1/completions";
    const response = await ask(where, request(root, message), mine.controller.signal);
    for await (const { choices, usage } of events(response)) {
      message.usage = usage ?? message.usage;
      for (const { delta, text, logprobs, finish_reason } of choices) {
        const more = text ?? delta?.content ?? "";
        message.content += more;
        // A token that is half a character comes without text, which is the next one's.
        for (const token of logprobs?.content ?? []) tokens.push({ ...token, text: more });
        message.finish = finish_reason ?? message.finish;
      }
      const now = performance.now();
      if (tokens.length) first ??= { now, count: tokens.length };
      if (tokens.length > first?.count) {
        message.rate = (1000 * (tokens.length - first.count)) / (now - first.now);
      }
      if (Date.now() > root.changed + 1000) save(root);
      draw(message);
    }
    if (!message.finish) throw new Error("The connection ended before the answer did.");
  } catch (error) {
    if (mine.controller.signal.aborted) message.finish = "stopped";
    else message.error = error.message;
  }
  if (running.get(root) === mine) running.delete(root);
  save(root);
  if (root !== talk) return showTalks();
  keepEnd(() => boxes.has(message) && dress(boxes.get(message), message));
  showState();
  $("spoken").textContent = message.error ?? message.content;
}

function answer(root, parent) {
  return generate(root, add(parent, { role: "assistant", content: "" }));
}

function send() {
  const text = $("draft").value;
  const last = path(talk).at(-1);
  if (running.has(talk) || (!text.trim() && (isChat() || !last))) return;
  if (isChat() && last && !last.content.trim()) {
    return notice("The last answer is empty: get another one first, or edit the question.");
  }
  notice();
  $("draft").value = talk.draft = "";
  if (text) answer(talk, add(last ?? talk, { role: "user", content: text }));
  else if (last.role === "user") answer(talk, last);
  else generate(talk, last);
  $("log").scrollTop = $("log").scrollHeight;
}

function stop() {
  running.get(talk)?.controller.abort();
}

// Messages

function show() {
  const log = $("log");
  const held = log !== document.activeElement && log.contains(document.activeElement);
  const messages = path(talk);
  const hint = isChat() ? "Ask something." : "Begin a text; the model continues it.";
  boxes.clear();
  keepEnd(() => {
    log.replaceChildren(...messages.map((message) => dress(element("article", {}), message)));
    if (!messages.length) log.append(element("p", { className: "empty", textContent: hint }));
  });
  if (held && !editing && !TOUCH) $("draft").focus(); // what had the focus is gone
  hideOthers();
  showState();
}

function keepEnd(change) { // scrolls only for who is at the end
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

let waiting = null; // messages that have grown since the last frame
function draw(message) {
  if (waiting) return waiting.add(message);
  waiting = new Set([message]);
  requestAnimationFrame(() => {
    keepEnd(() => waiting.forEach((one) => boxes.has(one) && fill(boxes.get(one), one)));
    waiting = null;
  });
}

function dress(box, message) {
  const root = talk;
  const parent = before(root, message).at(-1) ?? root;
  const going = running.get(root)?.message === message;
  if (!isChat()) box.tabIndex = 0; // its buttons show when it has the focus
  box.className = `${message.role}${going ? " going" : ""}`;
  box.ariaLabel = message.role === "user" ? "You" : "Model";
  boxes.set(message, box);
  if (editing === message) return editor(box, root, parent, message);
  const body = box.querySelector(".body") ?? element("div", { className: "body" });
  if (!body.isConnected) box.append(body);
  while (body.nextSibling) body.nextSibling.remove();
  if (message.error) {
    const again = button(message.content ? "Continue" : "Retry", "", () => generate(root, message));
    const shown = message.children.length ? [message.error] : [message.error, again];
    box.append(element("div", { className: "error", role: "alert" }, ...shown));
  }
  const bar = element("div", { className: "bar" }, element("span", { className: "facts" }));
  if (!going) bar.prepend(...buttons(root, parent, message));
  box.append(bar);
  fill(box, message);
  return box;
}

function buttons(root, parent, message) {
  const { children, at } = parent;
  const { role, content, finish } = message;
  const made = [];
  if (children.length > 1) {
    const turn = (by) => () => { parent.at += by; save(root); show(); };
    made.push(button("<", "The one before", turn(-1)), button(">", "The next one", turn(1)));
    [made[0].disabled, made[1].disabled] = [at === 0, at === children.length - 1];
    made.splice(1, 0, element("span", { textContent: `${at + 1}/${children.length}` }));
  }
  made.push(button("Copy", "", ({ target }) => copy(content, target)));
  made.push(button("Edit", "In a branch beside this", () => { editing = message; show(); }));
  if (role === "user") return made;
  made.push(button("Regenerate", "In a branch beside this", () => answer(root, parent)));
  if (content && finish !== "stop" && !message.error && !message.children.length) {
    made.push(button("Continue", "From where it ends", () => generate(root, message)));
  }
  if (server?.collect && isChat() && content) {
    for (const [word, thumb] of [["Good", 1], ["Bad", -1]]) {
      const title = "A good and a bad answer to one question become a pair to learn from";
      made.push(button(word, title, () => judge(root, parent, message, thumb)));
      made.at(-1).ariaPressed = message.thumb === thumb;
      made.at(-1).disabled = Boolean(message.paired); // what was learned from is not taken back
    }
  }
  return made;
}

async function judge(root, parent, message, thumb) {
  message.thumb = message.thumb === thumb ? 0 : thumb;
  const messages = said(root, before(root, message));
  try {
    for (const other of parent.children) {
      if (!message.thumb || other.thumb !== -thumb || other.content === message.content) continue;
      const [chosen, rejected] = thumb > 0 ? [message, other] : [other, message];
      const pair = { messages, chosen: chosen.content, rejected: rejected.content };
      await ask("feedback", pair);
      message.paired = other.paired = true;
    }
  } catch (error) {
    message.thumb = 0;
    notice(error.message);
  }
  save(root);
  show();
}

function editor(box, root, parent, message) {
  const area = element("textarea", { value: message.content, ariaLabel: "Edit" });
  const leave = () => { editing = null; show(); };
  const done = () => {
    if (!area.value.trim()) return;
    editing = null;
    const made = add(parent, { role: message.role, content: area.value, finish: "stop" });
    if (made.role === "user") return answer(root, made);
    save(root);
    show();
  };
  area.onkeydown = (event) => {
    if (event.key === "Escape") leave();
    else if (entered(event)) done();
  };
  const word = message.role === "user" ? "Send" : "Save";
  const bar = element("div", {}, button(word, "", done), " ", button("Cancel", "Esc", leave));
  box.replaceChildren(area, bar);
  requestAnimationFrame(() => area.focus());
  return box;
}

function fill(box, message) {
  const body = box.querySelector(".body");
  const facts = box.querySelector(".facts");
  if (!facts) return; // it is being edited
  const { from = 0, tokens = [] } = drawn.get(message) ?? {};
  const parts = [];
  if (tokens.length) parts.push(`${tokens.length} tokens`);
  if (message.rate) parts.push(`${message.rate.toFixed(message.rate < 10 ? 1 : 0)} tokens/s`);
  if (looking && tokens.length) {
    const mean = tokens.reduce((sum, { logprob }) => sum + logprob, 0) / tokens.length;
    parts.push(`perplexity ${Math.exp(-mean).toFixed(2)}`);
    fillTokens(body, message, from, tokens);
  } else {
    if (looking && message.role === "assistant" && message.content) parts.push("no tokens kept");
    fillText(body, message.content);
  }
  if (message.finish === "length") parts.push("cut at its longest");
  if (message.finish === "stopped") parts.push("stopped");
  const { dropped_messages: messages, dropped_tokens: beginning } = message.usage ?? {};
  if (messages) parts.push(`the first ${messages} messages no longer fit`);
  else if (beginning) parts.push(`the first ${beginning} tokens no longer fit`);
  facts.textContent = parts.join(" · ");
}

function fillText(body, content) {
  const wanted = isChat() ? [] : [["P", content]];
  if (isChat()) content.split(/^```.*\n?/m).forEach((part, i) => { // text and code in turn
    const paragraphs = i % 2 ? [] : part.split(/\n{2,}/).map((p) => p.replace(/^\n|\n$/g, ""));
    if (i % 2) wanted.push(["PRE", part.replace(/\n$/, "")]);
    wanted.push(...paragraphs.filter(Boolean).map((p) => ["P", p]));
  });
  wanted.forEach(([tag, text], i) => { // what is there stays, and with it what a reader selected
    if (body.children[i]?.tagName !== tag || body.children[i].className) {
      while (body.children[i]) body.lastChild.remove();
      body.append(element(tag, {}));
    }
    if (body.children[i].textContent !== text) body.children[i].textContent = text;
  });
  while (body.children.length > wanted.length) body.lastChild.remove();
}

// Tokens

function fillTokens(body, message, from, tokens) {
  let line = body.querySelector(".tokens");
  if (!line) {
    line = element("p", { className: "tokens" }, message.content.slice(0, from));
    line.onmouseover = ({ target }) => soon(() => target !== line && showOthers(message, target));
    line.onclick = ({ target }) => { if (target !== line) showOthers(message, target, true); };
    line.onmouseleave = () => soon(hideOthers);
    line.onkeydown = (event) => {
      const { key, target } = event;
      if (key === "ArrowRight") target.nextElementSibling?.focus();
      if (key === "ArrowLeft") target.previousElementSibling?.focus();
      if (key !== "Enter") return;
      event.preventDefault(); // it would click what gets the focus now
      showOthers(message, target, true);
    };
    body.replaceChildren(line);
  }
  for (let i = line.children.length; i < tokens.length; i++) {
    const { id, text, logprob, top_logprobs } = tokens[i];
    const span = element("span", { textContent: text, tabIndex: i ? -1 : 0 });
    span.style.setProperty("--p", Math.exp(logprob));
    span.classList.toggle("other", id !== top_logprobs[0]?.id);
    span.classList.toggle("break", text.startsWith("\n"));
    span.classList.toggle("end", isMark(tokens[i]));
    line.append(span);
  }
}

function visible({ token, bytes }) {
  const isHalf = bytes && token.includes("\ufffd"); // a part of a character
  if (isHalf) return bytes.map((byte) => byte.toString(16)).join(" ");
  return token.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

function showOthers(message, span, focused = false) {
  clearTimeout(timer);
  if (!span.isConnected) return;
  const index = [...span.parentNode.children].indexOf(span);
  const token = drawn.get(message).tokens[index];
  const choices = token.top_logprobs.filter(({ id }) => id !== token.id);
  choices.push(token);
  choices.sort((a, b) => b.logprob - a.logprob);
  const rows = choices.map((choice) => {
    const p = Math.exp(choice.logprob);
    const made = button("", "", () => fork(message, index, choice));
    made.append(element("code", { textContent: visible(choice) }));
    made.append(p < 1e-4 ? "< 0.01 %" : `${(100 * p).toFixed(p < 0.01 ? 2 : 1)} %`);
    made.style.setProperty("--p", p);
    made.classList.toggle("drawn", choice === token);
    made.disabled = !choice.bytes || (isMark(choice) && choice.id !== server?.marks.end);
    return made;
  });
  const others = $("others");
  others.replaceChildren(...rows, element("p", { textContent: "Click one to continue from it." }));
  others.hidden = false;
  others.span = span;
  const place = span.getClientRects()[0];
  const left = Math.max(4, Math.min(place.left, innerWidth - others.offsetWidth - 4));
  const fits = place.bottom + others.offsetHeight < innerHeight;
  others.style.left = `${left}px`;
  others.style.top = `${fits ? place.bottom : place.top - others.offsetHeight}px`;
  if (focused) others.firstChild.focus();
}

let timer = 0;
function soon(change) { // unless the mouse has gone on by then
  clearTimeout(timer);
  timer = setTimeout(change, 150);
}

function hideOthers() {
  $("others").hidden = true;
}

function fork(message, index, choice) {
  const { from, tokens } = drawn.get(message);
  const parent = before(talk, message).at(-1) ?? talk;
  const kept = tokens.slice(0, index);
  const halves = kept.slice(kept.findLastIndex((token) => token.text) + 1); // of a character
  const bytes = Uint8Array.from([...halves, choice].flatMap((token) => token.bytes));
  const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes).replace(/\ufffd+$/, "");
  kept.push({ ...choice, text, top_logprobs: tokens[index].top_logprobs });
  const content = message.content.slice(0, from) + kept.map((token) => token.text).join("");
  const made = add(parent, { role: "assistant", content });
  drawn.set(made, { from, tokens: kept });
  if (!isMark(choice)) return generate(talk, made);
  made.finish = "stop"; // the choice was to end here
  save(talk);
  show();
}

// Around the messages

function showState() {
  const busy = running.has(talk);
  $("send").textContent = busy ? "Stop" : isChat() ? "Send" : "Continue";
  $("send").title = busy ? "Esc" : TOUCH ? "" : "Enter; Shift+Enter begins a line";
  $("draft").placeholder = isChat() ? "Ask the model" : "Text to continue, or nothing to go on";
  $("look").ariaPressed = looking;
  document.body.classList.toggle("text", !isChat());
  const used = path(talk).findLast(({ usage }) => usage)?.usage.total_tokens;
  const size = server?.block_size;
  $("context").hidden = !used || !size;
  [$("used").max, $("used").value] = [size ?? 1, used ?? 0];
  const left = Math.max(0, size - used);
  $("left").textContent = `context: ${used} of ${size} tokens used, ${left} left`;
  showTalks();
}

function titled(root) {
  return root.title || path(root)[0]?.content.trim().slice(0, 60) || "New conversation";
}

function showTalks() {
  if ($("talks").querySelector("input")) return; // a title is being typed
  $("talks").replaceChildren(...talks.map((root) => {
    const title = button(titled(root), titled(root), () => open(root));
    title.className = "title";
    const item = element("li", {}, title);
    if (root !== talk) return item;
    item.className = "now";
    title.ariaCurrent = "true";
    item.append(button("✎", "Rename", () => rename(root, title)));
    item.append(button("⤓", "Export", () => exported([root])));
    item.append(button("✕", "Delete", () => remove(root)));
    return item;
  }));
}

function rename(root, title) {
  const input = element("input", { value: titled(root), ariaLabel: "Title" });
  input.onblur = () => {
    root.title = input.value.trim();
    input.remove();
    save(root);
    showTalks();
  };
  input.onkeydown = ({ key }) => {
    if (key === "Escape") input.value = root.title;
    if (key === "Escape" || key === "Enter") input.blur();
  };
  title.replaceWith(input);
  input.select();
}

function remove(root) {
  if (!confirm(`Delete "${titled(root)}"? There is no other copy of it.`)) return;
  stop();
  root.deleted = true;
  talks = talks.filter((other) => other !== root);
  localStorage.removeItem(KEPT + root.id);
  open(talks[0] ?? created());
}

function row(root) { // a line for data/chat/prepare.py or data/text/prepare.py, or null
  const shown = path(root);
  if (!isChat()) return shown.length ? { text: shown.map((m) => m.content).join("") } : null;
  const empty = shown.findIndex(({ content }) => !content.trim());
  const whole = shown.slice(0, empty < 0 ? shown.length : empty);
  if (whole.at(-1)?.role === "user") whole.pop();
  const isCut = ({ role, finish }) => role === "assistant" && finish !== "stop";
  if (!whole.some((message) => message.role === "assistant" && !isCut(message))) return null;
  const messages = said(root, whole);
  // What was cut is read and not learned: else a model would learn to end like this.
  whole.forEach((m, i) => isCut(m) && (messages.at(i - whole.length).weight = 0));
  return { messages };
}

function exported(roots) {
  const rows = roots.map(row).filter(Boolean);
  const left = roots.length - rows.length;
  notice(left ? `${left} of ${roots.length} left out: no answer in them has come to its end.` : "");
  if (!rows.length) return;
  const file = new Blob(rows.map((one) => `${JSON.stringify(one)}\n`), { type: "text/plain" });
  const href = URL.createObjectURL(file);
  element("a", { href, download: "conversations.jsonl" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

function imported(line) { // Raises an Error that says what is wrong with the line.
  const { text, messages = [{ role: "user", content: text }] } = JSON.parse(line);
  const root = created(messages[0]?.role === "system" ? messages.shift().content : "");
  const isText = ({ content }) => typeof content === "string";
  if (![{ content: root.system }, ...messages].every(isText)) throw new Error("not all is text");
  if (!messages.length) throw new Error("it has no messages");
  messages.reduce((parent, { role, content, weight }, i) => {
    const due = ["user", "assistant"][i % 2];
    if (role !== due) throw new Error(`message ${i + 1} should be of role ${due}`);
    return add(parent, { role, content, finish: weight === 0 ? "length" : "stop" });
  }, root);
  return root;
}

async function importFile({ target }) {
  const lines = (await target.files[0].text()).split("\n");
  target.value = ""; // the same file may be chosen again
  const made = [];
  for (const [i, line] of lines.entries()) {
    try {
      if (line.trim()) made.push(imported(line));
    } catch (error) {
      return notice(`Nothing was imported, because of line ${i + 1}: ${error.message}`);
    }
  }
  notice(made.length ? "" : "Nothing was imported: the file is empty.");
  made.forEach(save);
  if (made.length) open(made[0]);
}

async function copy(text, shown) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else { // the page came from another machine without https
    const area = element("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  shown.textContent = "Copied";
  setTimeout(() => (shown.textContent = "Copy"), 1500);
}

function notice(...parts) {
  $("notice").replaceChildren(...parts);
}

function showSettings() {
  const system = element("textarea", { name: "system", value: talk.system });
  system.oninput = () => { talk.system = system.value; save(talk); };
  const label = element("label", { className: "long" }, "System message", system);
  const fields = isChat() ? [label] : [];
  for (const [name, title] of Object.entries(OPTIONS)) {
    const placeholder = server?.defaults[name] ?? "";
    const value = settings[name] ?? "";
    const input = element("input", { type: "number", step: "any", name, value, placeholder });
    input.onchange = () => {
      if (input.value) settings[name] = input.valueAsNumber;
      else delete settings[name];
      keep("scalegpt/settings", JSON.stringify(settings));
    };
    fields.push(element("label", {}, title, input));
  }
  if (needsKey) {
    const input = element("input", { type: "password", name: "key" });
    input.onchange = () => { sessionStorage.key = input.value; meet(); };
    fields.push(element("label", {}, "Key of the server", input));
    $("settings").hidden = false;
  }
  $("settings").replaceChildren(...fields);
}

async function meet() {
  notice();
  try {
    server = await (await ask("props")).json();
    needsKey = false;
    const { name, step, val_loss: loss } = server;
    $("model").textContent = document.title = name;
    const facts = [step != null && `step ${step}`, loss != null && `val loss ${loss.toFixed(4)}`];
    $("facts").textContent = facts.filter(Boolean).join(" · ");
  } catch (error) {
    notice(`${error.message} `, button("Retry", "", meet));
  }
  showSettings();
  show();
}

function entered(event) { // the Enter that ends a composed word of Chinese or Japanese is none
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || TOUCH) return false;
  event.preventDefault();
  return true;
}

$("new").onclick = () => open(talks.includes(talk) ? created(talk.system) : talk);
$("send").onclick = () => { if (running.has(talk)) stop(); else send(); };
// A handler that returns false would swallow the key.
$("draft").onkeydown = (event) => { if (entered(event)) send(); };
$("draft").oninput = () => { talk.draft = $("draft").value; save(talk); };
$("log").onscroll = hideOthers;
$("others").onmouseenter = () => clearTimeout(timer);
$("others").onmouseleave = () => soon(hideOthers);
$("look").onclick = () => { keep("scalegpt/looking", (looking = !looking)); show(); };
$("set").onclick = () => {
  $("settings").hidden = !$("settings").hidden;
  $("set").ariaExpanded = !$("settings").hidden;
};
$("page").onclick = ({ target }) => { // a narrow screen shows the conversations only when asked
  const isShown = target === $("menu") && !document.body.classList.contains("side");
  document.body.classList.toggle("side", isShown);
  $("menu").ariaExpanded = isShown;
};
$("export").onclick = () => exported(talks);
$("import").onclick = () => $("file").click();
$("file").onchange = importFile;
document.onkeydown = ({ key }) => {
  if (key !== "Escape" || editing) return;
  if ($("others").hidden) return stop();
  hideOthers();
  $("others").span.focus();
};
load();
open(talks[0] ?? created());
meet();
