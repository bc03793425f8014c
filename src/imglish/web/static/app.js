"use strict";

const SAY = {
  en: {
    title: "Image search", words: "Describe a picture, or drop one here", go: "Search", options: "Options",
    other: "中文", pick: "Search with a picture", remove: "Remove the picture", without: "Without",
    filter: "Filter", least: "Match at least", any: "any", similar: "Similar pictures", next: "More pictures",
    drop: "Drop the picture to search with it", retry: "Try again", close: "Close (Esc)",
    back: "Previous (←)", forward: "Next (→)", keyGo: "Open", key: "API key", place: "Place", match: "Match",
    cosine: "Towers", date: "Date", size: "Size", tags: "Tags", file: "Name", duplicate: "Duplicate of",
    searching: "Searching …", noCaption: "No caption", found: "Where the words are", wholeText: "all words",
    foundText: "Where the model looked while it compared the words with the picture: a hint, no proof. The bar shows how "
      + "much a word mattered.",
    start: "What are you looking for?", startText: n => `${n} pictures. Press / to type, arrow keys to move, Enter to look closer.`,
    none: "No picture found", noneText: "The filter lets no picture through, or the index is empty.",
    weak: "No good match", weakText: n => `No picture reaches a match of ${n} %. Lower the limit to see the nearest ones.`,
    towers: (n, s) => `${n} pictures in ${s} s, now being looked at more closely …`,
    done: (n, s) => `${n} pictures in ${s} s`,
    reranked: (n, m, s) => `${n} pictures; the first ${m} compared with the words one by one, ${s} s`,
    notReranked: why => `Shown by the first look alone: ${why}`,
    moved: n => n > 0 ? `moved up ${n}` : `moved down ${-n}`,
    from: (now, before) => now === before ? `${now}` : `${now} (first look: ${before})`,
    uncalibrated: share => `${share} (not calibrated)`, note: (text, notes) => `${text}. ${notes.join("; ")}`,
    examples: ["a dog in the snow", "children playing", "black top, white trousers"],
    errors: {
      busy: "The server is busy. Try again in a moment.", key: "This server needs an API key.",
      "too large": "The picture is too large.", picture: "This file cannot be read as a picture.",
      network: "The server does not answer. Is it running?", index: "The index cannot be read now.",
      origin: "Requests from other sites are refused.",
    },
    failed: "That did not work", wrongKey: "That is not the key.", notes: [],
  },
  zh: {
    title: "图片搜索", words: "描述一张图片，或把图片拖到这里", go: "搜索", options: "选项",
    other: "English", pick: "用图片搜索", remove: "移除图片", without: "不要",
    filter: "筛选", least: "匹配度至少", any: "不限", similar: "相似图片", next: "更多图片",
    drop: "松开即可用这张图片搜索", retry: "重试", close: "关闭 (Esc)",
    back: "上一张 (←)", forward: "下一张 (→)", keyGo: "打开", key: "API 密钥", place: "名次", match: "匹配度",
    cosine: "双塔得分", date: "日期", size: "尺寸", tags: "标签", file: "名称", duplicate: "重复于",
    searching: "正在搜索 …", noCaption: "没有说明文字", found: "词语在图中的位置", wholeText: "整句",
    foundText: "模型比对文字与图片时关注的区域，仅供参考。横条表示该词的作用大小。",
    start: "想找什么图片？", startText: n => `共 ${n} 张图片。按 / 输入，方向键移动，回车查看大图。`,
    none: "没有找到图片", noneText: "筛选条件没有留下任何图片，或者索引是空的。",
    weak: "没有足够匹配的图片", weakText: n => `没有图片的匹配度达到 ${n}%。降低要求可以看到最接近的图片。`,
    towers: (n, s) => `${s} 秒找到 ${n} 张，正在逐张细看 …`,
    done: (n, s) => `${s} 秒找到 ${n} 张`,
    reranked: (n, m, s) => `${n} 张图片；前 ${m} 张已逐张与文字比对，用时 ${s} 秒`,
    notReranked: why => `仅按初步结果排列：${why}`,
    moved: n => n > 0 ? `上升 ${n} 位` : `下降 ${-n} 位`,
    from: (now, before) => now === before ? `${now}` : `${now}（初步：${before}）`,
    uncalibrated: share => `${share}（未校准）`, note: (text, notes) => `${text}。${notes.join("；")}`,
    examples: ["雪地里的狗", "玩耍的孩子", "黑色上衣，白色裤子"],
    errors: {
      busy: "服务器正忙，请稍后再试。", key: "此服务器需要 API 密钥。",
      "too large": "图片太大。", picture: "无法把这个文件读成图片。",
      network: "服务器没有响应。它在运行吗？", index: "现在无法读取索引。",
      origin: "拒绝来自其他网站的请求。",
    },
    failed: "出错了", wrongKey: "密钥不正确。",
    notes: [  // what the server says, and the same in Chinese
      [/vocabulary does not have (\d+) parts/, n => `模型的词表中没有其中 ${n} 个词`],
      [/(\d+) of the first (\d+) pictures cannot be read/, (n, m) => `前 ${m} 张中有 ${n} 张无法读取`],
      [/min_match needs reranking/, () => "匹配度需要逐张比对，此处未使用"],
    ],
  },
};

const el = id => document.getElementById(id);
const GAP = 6;
const PAGE = 40;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let language = stored("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let say = SAY[language];
let info = null;
let picture = null;        // the File to search with
let hits = [];             // in the order that is shown
let shown = null;          // key of the large picture
let running = null;        // AbortController of the search under way
let asked = null;          // what the pictures on the page answer
let last = null;           // its last answer, or {error}
let heat = null;           // what the server says of the words in the large picture
const tiles = new Map();   // key -> li

function stored(name) {
  try { return localStorage.getItem(name); } catch { return null; }
}

function make(tag, properties = {}, ...children) {
  const found = Object.assign(document.createElement(tag), properties);
  found.append(...children);
  return found;
}

// ---- words in the person's language -------------------------------------------------------------------------------

function speak() {
  say = SAY[language];
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = info ? `${say.title}: ${info.name}` : say.title;
  el("words").placeholder = say.words;
  el("words").setAttribute("aria-label", say.words);
  for (const node of document.querySelectorAll("[data-say]")) node.textContent = say[node.dataset.say];
  for (const [id, text] of [["go", say.go], ["more-options", say.options], ["language", say.other], ["next", say.next],
    ["drop", say.drop], ["retry", say.retry], ["key-go", say.keyGo]]) el(id).textContent = text;
  for (const [id, text] of [["pick", say.pick], ["chip-remove", say.remove], ["close", say.close], ["back", say.back],
    ["forward", say.forward], ["key", say.key]]) {
    el(id).title = text;
    el(id).setAttribute("aria-label", text);
  }
  el("least-value").textContent = Number(el("least").value) ? `${el("least").value} %` : say.any;
  for (const hit of hits) badge(tiles.get(hit.key), hit);
  tell();
  if (shown !== null) { facts(hits.find(hit => hit.key === shown)); words(); }
}

function noted(text) {
  for (const [pattern, words] of say.notes) {
    const found = pattern.exec(text);
    if (found) return words(...found.slice(1));
  }
  return text;
}

// What the status line and the middle of the page say about the last answer.
function tell() {
  const status = el("status");
  const note = (title, text, more = {}) => {
    el("message").hidden = false;
    el("message-title").textContent = title;
    el("message-text").textContent = text;
    el("examples").replaceChildren(...(more.examples || []).map(words => make("button", {
      type: "button", textContent: words, onclick() { el("words").value = words; search(); },
    })));
    el("retry").hidden = !more.retry;
    el("key-form").hidden = !more.key;
  };
  status.classList.remove("wrong");
  el("message").hidden = true;
  el("next").hidden = true;
  if (last === null) {
    status.textContent = asked ? say.searching : "";
    if (!asked && info) note(say.start, say.startText(info.pictures), { examples: say.examples });
  } else if (last.error) {
    const text = say.errors[last.error.code] || last.error.message;
    if (last.error.code === "key") {
      status.textContent = "";
      note(say.errors.key, last.error.again ? say.wrongKey : "", { key: true });
    } else if (hits.length) {
      status.textContent = say.notReranked(text);
      status.classList.add("wrong");
    } else {
      status.textContent = "";
      note(say.failed, text, { retry: true });
    }
  } else {
    const seconds = last.seconds.toFixed(2);
    status.textContent = !last.last ? say.towers(last.total, seconds)
      : last.reranked ? say.reranked(last.total, last.reranked, seconds) : say.done(last.total, seconds);
    if (last.notes.length) status.textContent = say.note(status.textContent, last.notes.map(noted));
    el("next").hidden = !last.more || !last.last;
    if (!hits.length && last.no_good_match) note(say.weak, say.weakText(el("least").value));
    else if (!hits.length) note(say.none, say.noneText);
  }
}

// ---- searching ----------------------------------------------------------------------------------------------------

function wish() {
  return {
    text: el("words").value.trim(), image: picture, not_text: el("not-words").value.trim(),
    where: el("where").value.trim(), min_match: Number(el("least").value) / 100,
  };
}

function remember(query) {
  const parts = new URLSearchParams();
  for (const [name, value] of [["q", query.text], ["not", query.not_text], ["where", query.where],
    ["match", query.min_match || ""]]) if (value) parts.set(name, value);
  const address = parts.size ? `?${parts}` : location.pathname;
  if (address !== (location.search || location.pathname)) history.pushState(null, "", address);
}

function recall() {
  const parts = new URLSearchParams(location.search);
  el("words").value = parts.get("q") || "";
  el("not-words").value = parts.get("not") || "";
  el("where").value = parts.get("where") || "";
  el("least").value = String(Math.round(100 * (Number(parts.get("match")) || 0)));
  if (parts.has("not") || parts.has("where") || parts.has("match")) options(true);
  if (el("words").value) search(false);
}

async function search(keep = true) {
  const query = wish();
  if (!query.text && !query.image) return;
  if (keep) remember(query);
  asked = query;
  last = null;
  tell();
  await ask(query, 0);
}

async function ask(query, offset) {
  running?.abort();
  const mine = running = new AbortController();
  const body = new FormData();
  for (const name of ["text", "not_text", "where"]) if (query[name]) body.set(name, query[name]);
  if (query.image) body.set("image", query.image);
  if (query.min_match) body.set("min_match", String(query.min_match));
  body.set("k", String(PAGE));
  body.set("offset", String(offset));
  const before = offset ? hits.slice() : [];
  try {
    const response = await fetch("v1/search/stream", { method: "POST", body, signal: mine.signal });
    if (!response.ok) throw await problem(response);
    for await (const answer of lines(response)) {
      if (mine !== running) return;
      last = answer;
      if (!answer.error) {
        const known = new Set(before.map(hit => hit.key));
        show([...before, ...answer.hits.filter(hit => !known.has(hit.key))], !answer.last);
      }
      tell();
    }
  } catch (error) {
    if (error.name === "AbortError" || mine !== running) return;
    if (!offset) show([], false);
    last = { error: error.code ? error : { code: "network", message: String(error) } };
    tell();
  } finally {
    if (mine === running) el("grid").classList.remove("waiting");
  }
}

async function problem(response) {
  try { return (await response.json()).error; } catch { return { code: "http", message: `HTTP ${response.status}` }; }
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}

// ---- the grid -----------------------------------------------------------------------------------------------------

const source = (kind, key) => `v1/picture/${kind}?key=${encodeURIComponent(key)}&v=${info ? info.version : 0}`;

function thumbnail(hit) {
  const image = make("img", { src: source("thumbnail", hit.key), alt: hit.captions[0] || hit.key, decoding: "async" });
  const button = make("button", { type: "button", className: "tile", title: hit.captions[0] || hit.key }, image,
    make("span", { className: "name", textContent: hit.key }));
  image.onerror = () => button.classList.add("broken");
  return button;
}

function show(found, waiting) {
  const old = new Map();
  for (const [key, item] of tiles) old.set(key, item.getBoundingClientRect());
  const focused = document.activeElement?.closest?.("#grid li")?.dataset.key;
  const keys = new Set(found.map(hit => hit.key));
  for (const [key, item] of tiles) if (!keys.has(key)) { item.remove(); tiles.delete(key); }
  hits = found;
  for (const hit of hits) {
    let item = tiles.get(hit.key);
    if (!item) {
      const button = thumbnail(hit);
      button.onclick = () => view(hit.key);
      button.append(make("span", { className: "badges" }));
      item = make("li", {}, button);
      item.dataset.key = hit.key;
      tiles.set(hit.key, item);
    }
    badge(item, hit);
  }
  const order = hits.map(hit => tiles.get(hit.key));
  if (order.some((item, i) => el("grid").children[i] !== item)) el("grid").replaceChildren(...order);
  el("grid").classList.toggle("waiting", waiting);
  layout();
  for (const [key, item] of tiles) {
    const was = old.get(key), now = item.getBoundingClientRect();
    if (!was || calm.matches || (was.left === now.left && was.top === now.top)) continue;
    const [x, y] = [was.left - now.left, was.top - now.top];
    item.animate([{ translate: `${x}px ${y}px` }, { translate: "0 0" }], { duration: 450, easing: "ease-in-out" });
  }
  if (focused && tiles.has(focused)) tiles.get(focused).firstChild.focus({ preventScroll: true });
}

function badge(item, hit) {
  const parts = [];
  if (hit.match !== null) parts.push(make("span", { textContent: percent(hit.match), title: `${say.match} ${matched(hit)}` }));
  if (hit.moved) parts.push(make("span", {
    className: hit.moved > 0 ? "up" : "down", title: say.moved(hit.moved),
    textContent: (hit.moved > 0 ? "▲" : "▼") + Math.abs(hit.moved),
  }));
  item.querySelector(".badges").replaceChildren(...parts);
}

const percent = share => `${Math.round(100 * share)} %`;
const matched = hit => info?.calibrated ? percent(hit.match) : say.uncalibrated(percent(hit.match));
const aspect = hit => Math.min(3.5, Math.max(0.4, hit.width && hit.height ? hit.width / hit.height : 4 / 3));

// Rows of one height that fill the width, each picture in its own shape.
function layout() {
  const width = el("grid").clientWidth;
  const wanted = width < 600 ? 130 : 210;
  let top = 0, row = [], sum = 0;
  const place = height => {
    let left = 0;
    for (const hit of row) {
      const style = tiles.get(hit.key).style, across = height * aspect(hit);
      Object.assign(style, { left: `${left}px`, top: `${top}px`, width: `${across}px`, height: `${height}px` });
      left += across + GAP;
    }
    top += height + GAP;
    row = [];
    sum = 0;
  };
  for (const hit of hits) {
    row.push(hit);
    sum += aspect(hit);
    const height = (width - GAP * (row.length - 1)) / sum;
    if (height <= wanted) place(height);
  }
  if (row.length) place(Math.min(wanted, (width - GAP * (row.length - 1)) / sum));
  el("grid").style.height = `${top}px`;
}

// The picture nearest to the focused one in a direction.
function neighbour(item, key) {
  const order = [...el("grid").children], at = order.indexOf(item);
  if (key === "ArrowRight") return order[at + 1];
  if (key === "ArrowLeft") return order[at - 1];
  const middle = item.offsetLeft + item.offsetWidth / 2, down = key === "ArrowDown";
  const tops = order.map(other => other.offsetTop).filter(top => down ? top > item.offsetTop : top < item.offsetTop);
  if (!tops.length) return undefined;
  const row = down ? Math.min(...tops) : Math.max(...tops);
  return order.filter(other => other.offsetTop === row)
    .map(other => [Math.abs(other.offsetLeft + other.offsetWidth / 2 - middle), other])
    .sort((a, b) => a[0] - b[0])[0][1];
}

// ---- one picture --------------------------------------------------------------------------------------------------

async function view(key) {
  shown = key;
  const hit = hits.find(one => one.key === key);
  el("large").src = source("thumbnail", key);
  const large = new Image();
  large.onload = () => { if (shown === key) { el("large").src = large.src; place(); } };
  large.src = source("large", key);
  facts(hit);
  el("similar").replaceChildren();
  find(key);
  if (!el("view").open) el("view").showModal();
  el("close").focus();
  try {
    const address = encodeURIComponent(key);
    if (!hit) {
      const response = await fetch(`v1/picture?key=${address}`);
      if (response.ok && shown === key) facts(await response.json());
    }
    const response = await fetch(`v1/picture/similar?key=${address}&k=12`);
    if (!response.ok || shown !== key) return;
    el("similar").replaceChildren(...(await response.json()).map(other => {
      const button = thumbnail(other);
      button.onclick = () => view(other.key);
      return button;
    }));
  } catch { /* the large picture stays without similar ones; a search will tell that the server is gone */ }
}

// Asks where in the picture the words of the search are.
async function find(key) {
  heat = null;
  words();
  if (!asked?.text) return;
  try {
    const response = await fetch(`v1/picture/explain?${new URLSearchParams({ key, text: asked.text })}`);
    if (!response.ok || shown !== key) return;
    const found = await response.json();
    if (shown !== key) return;
    const unpack = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
    heat = { ...found, maps: found.maps.map(unpack), whole: unpack(found.whole), chosen: null };
    words();
  } catch { /* the large picture stays without its maps */ }
}

// A button for the whole text and for each word; pointing at one shows its map, pressing keeps it.
function words() {
  el("found").hidden = !heat;
  draw(null);
  if (!heat) return;
  const chip = (text, map, share) => {
    const button = make("button", { type: "button", textContent: text, ariaPressed: String(heat.chosen === map) });
    button.style.setProperty("--share", share);
    button.onpointerenter = button.onfocus = () => draw(map);
    button.onpointerleave = button.onblur = () => draw(heat?.chosen);
    button.onclick = () => {
      heat.chosen = heat.chosen === map ? null : map;
      for (const other of el("found-words").children) other.ariaPressed = String(other === button && heat.chosen === map);
      draw(heat.chosen);
    };
    return button;
  };
  el("found-words").replaceChildren(chip(say.wholeText, heat.whole, 1),
    ...heat.words.map((word, i) => chip(word, heat.maps[i], Math.max(...heat.maps[i]) / 255)));
}

// Lays a map over the picture, each from nothing to its own highest point.
function draw(map) {
  const canvas = el("heat");
  canvas.hidden = !map;
  if (!map) return;
  Object.assign(canvas, { width: heat.width, height: heat.height });
  const pixels = new ImageData(heat.width, heat.height), highest = Math.max(...map, 1);
  map.forEach((level, i) => pixels.data.set([255, 64, 0, 190 * level / highest], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  place();
}

// The map lies on what the model saw of the picture, wherever that is in the window.
function place() {
  const image = el("large"), stage = el("stage");
  if (!heat || !image.naturalWidth) return;
  const scale = Math.min(stage.clientWidth / image.naturalWidth, stage.clientHeight / image.naturalHeight);
  const [across, down] = [image.naturalWidth * scale, image.naturalHeight * scale];
  const [left, top, right, bottom] = heat.box;
  Object.assign(el("heat").style, {
    left: `${(stage.clientWidth - across) / 2 + left * across}px`, width: `${(right - left) * across}px`,
    top: `${(stage.clientHeight - down) / 2 + top * down}px`, height: `${(bottom - top) * down}px`,
  });
}

function facts(hit) {
  if (!hit) hit = { key: shown, captions: [], tags: [] };
  const captions = hit.captions.length ? hit.captions : [say.noCaption];
  el("large").alt = captions[0];
  el("captions").replaceChildren(...captions.map(text => make("li", { textContent: text })));
  const rows = [
    [say.place, hit.rank ? say.from(hit.rank, hit.rank_before) : ""],
    [say.match, typeof hit.match === "number" ? matched(hit) : ""],
    [say.cosine, typeof hit.cosine === "number" ? hit.cosine.toFixed(3) : ""],
    [say.date, hit.date], [say.size, hit.width ? `${hit.width} × ${hit.height}` : ""],
    [say.tags, hit.tags.join(", ")], [say.duplicate, hit.duplicate_of], [say.file, hit.key],
  ];
  el("facts").replaceChildren(...rows.filter(row => row[1]).flatMap(([name, value]) => [
    make("dt", { textContent: name }), make("dd", { textContent: value })]));
  const at = hits.findIndex(one => one.key === shown);
  el("back").hidden = at < 1;
  el("forward").hidden = at < 0 || at + 1 >= hits.length;
}

function step(by) {
  const next = hits[hits.findIndex(one => one.key === shown) + by];
  if (next && hits.some(one => one.key === shown)) view(next.key);
}

// ---- what the person does -----------------------------------------------------------------------------------------

function options(visible) {
  el("options").hidden = !visible;
  el("more-options").setAttribute("aria-expanded", String(visible));
  layout();
}

function take(file) {
  if (picture) URL.revokeObjectURL(el("chip-image").src);
  picture = file || null;
  el("chip").hidden = !picture;
  if (picture) {
    el("chip-image").src = URL.createObjectURL(picture);
    if (info && picture.size > info.upload) {
      show([], false);
      last = { error: { code: "too large" } };
      tell();
      return;
    }
    search();
  } else {
    el("chip-image").removeAttribute("src");
    el("file").value = "";
  }
}

el("search").onsubmit = event => { event.preventDefault(); search(); };
el("retry").onclick = () => info ? search() : start();
el("next").onclick = () => ask(asked, hits.length);
el("more-options").onclick = () => options(el("options").hidden);
el("least").oninput = () => {
  el("least-value").textContent = Number(el("least").value) ? `${el("least").value} %` : say.any;
};
el("least").onchange = () => search();
el("pick").onclick = () => el("file").click();
el("file").onchange = () => { if (el("file").files[0]) take(el("file").files[0]); };
el("chip-remove").onclick = () => { take(null); search(); };
el("language").onclick = () => {
  language = language === "en" ? "zh" : "en";
  try { localStorage.setItem("language", language); } catch { /* a private window: kept for this page alone */ }
  speak();
};
el("close").onclick = () => el("view").close();
el("back").onclick = () => step(-1);
el("forward").onclick = () => step(1);
el("view").onclose = () => {
  const item = tiles.get(shown);
  shown = heat = null;
  item?.firstChild.focus();
};
el("key-form").onsubmit = async event => {
  event.preventDefault();
  const body = new FormData();
  body.set("key", el("key").value);
  el("key").value = "";
  const response = await fetch("v1/session", { method: "POST", body });
  if (response.ok) { start(); return; }
  last = { error: { code: "key", again: true } };
  tell();
};

addEventListener("resize", () => { layout(); place(); });
addEventListener("popstate", recall);
addEventListener("dragover", event => { event.preventDefault(); el("drop").hidden = false; });
addEventListener("dragleave", event => { if (!event.relatedTarget) el("drop").hidden = true; });
addEventListener("drop", event => {
  event.preventDefault();
  el("drop").hidden = true;
  if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
});
addEventListener("paste", event => {
  const file = [...event.clipboardData.files].find(one => one.type.startsWith("image/"));
  if (file) take(file);
});
addEventListener("keydown", event => {
  if (el("view").open) {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
    return;
  }
  const typing = event.target.matches?.("input");
  if (event.key === "/" && !typing) { event.preventDefault(); el("words").select(); el("words").focus(); return; }
  if (!event.key.startsWith("Arrow")) return;
  const item = event.target.closest?.("#grid li");
  const next = item ? neighbour(item, event.key)
    : event.target.id === "words" && event.key === "ArrowDown" ? el("grid").firstElementChild : undefined;
  if (next) { event.preventDefault(); next.firstChild.focus(); next.scrollIntoView({ block: "nearest" }); }
  else if (item && event.key === "ArrowUp") { event.preventDefault(); el("words").focus(); }
});

async function start() {
  try {
    const response = await fetch("v1/info");
    if (!response.ok) throw await problem(response);
    info = await response.json();
    last = null;
    speak();
    recall();
  } catch (error) {
    last = { error: error.code ? error : { code: "network", message: String(error) } };
    speak();
  }
}

speak();
start();
