'use strict';
(() => {
  const $ = id => document.getElementById(id);
  const data = JSON.parse($('data').textContent), packed = $('images').textContent;
  $('data').remove();
  $('images').remove();
  const n = data.index.length, classes = data.classes, GAP = 8, BUFFER = 3;
  const isText = data.kind !== 'image', narrow = matchMedia('(max-width: 720px)');

  // Pictures: one long text of base64; a picture becomes an address when it is shown.
  const start = new Float64Array(n + 1);
  for (let i = 0; i < n; i++) start[i + 1] = start[i] + data.sizes[i];
  const source = i => `data:image/${data.format};base64,${packed.substring(start[i], start[i + 1])}`;
  const hasPicture = i => data.sizes[i] > 0;

  // Words
  const label = v => v === null ? '–' : classes ? classes[v] : String(v);
  const number = v => (Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(2) : v.toFixed(3)).replace('-', '−');
  const percent = v => v === null ? '' : `${Math.round(100 * v)}%`;
  const agrees = i => data.given[i] === data.predicted[i];
  const make = (tag, name, text) => {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Columns to sort by; a column without numbers is left out.
  const columns = data.columns;
  columns.disagreement = columns.confidence.map((p, i) =>
    p === null || columns.loss[i] === null ? null : Math.max(0, p - Math.exp(-columns.loss[i])));
  const SORTS = [['score', 'score', 1], ['probability', 'probability to be right', 1], ['weight', 'weight', 1],
    ['disagreement', 'disagreement of model and label', -1], ['loss', 'loss', -1]]
    .filter(([name]) => columns[name].some(v => v !== null));
  SORTS.push(['index', 'order of the data', 1]);
  for (const [name, words] of SORTS) $('sort').add(new Option(words, name));

  // Decisions: position -> [decision, label]; kept in this browser.
  const decisions = new Map(), undone = [], place = new Map(data.index.map((v, i) => [v, i]));
  const KEY = `kd_aif decisions ${data.key}`;
  let storable = true, waiting = 0;
  function read() {
    decisions.clear();
    try {
      for (const [index, found] of Object.entries(JSON.parse(localStorage.getItem(KEY) || '{}')))
        if (place.has(index)) decisions.set(place.get(index), found);
    } catch { storable = false; }
  }
  function keep() {
    clearTimeout(waiting);
    waiting = 0;
    try {
      localStorage.setItem(KEY, JSON.stringify(Object.fromEntries([...decisions].map(([i, v]) => [data.index[i], v]))));
    } catch { storable = false; }
  }
  const later = () => { if (!waiting) waiting = setTimeout(keep, 150); };
  addEventListener('pagehide', () => { if (waiting) keep(); });
  addEventListener('storage', event => { if (event.key === KEY) { read(); draw(true); detail(); } });

  // Which samples, in which order
  let order = [], chosen = 0, descending = false;
  function compare(column, sign) {
    return (a, b) => {
      const x = column[a], y = column[b];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      return sign * (x - y) || a - b;
    };
  }
  function passes() {
    const given = $('given').value, predicted = $('predicted').value, show = $('show').value;
    const find = $('find').value.trim().toLowerCase();
    return i => (given === '' || data.given[i] === +given) && (predicted === '' || data.predicted[i] === +predicted) &&
      (show === 'all' || (show === 'open' ? !decisions.has(i) : show === 'done' ? decisions.has(i) :
        show === 'differs' ? !agrees(i) : (decisions.get(i) || [])[0] === show)) &&
      (!find || data.index[i] === find || data.text[i].toLowerCase().includes(find) || data.path[i].toLowerCase().includes(find));
  }
  function arrange(selected) {
    const name = $('sort').value;
    order = Array.from({length: n}, (_, i) => i).filter(passes());
    if (name !== 'index') order.sort(compare(columns[name], descending ? -1 : 1));
    else if (descending) order.reverse();
    chosen = Math.max(0, selected === undefined ? 0 : order.indexOf(selected));
    $('direction').textContent = descending ? '↓ high first' : '↑ low first';
    $('direction').setAttribute('aria-label', descending ? 'highest first; change' : 'lowest first; change');
    $('count').textContent = order.length === n ? `${n.toLocaleString('en')} samples`
      : `${order.length.toLocaleString('en')} of ${n.toLocaleString('en')}`;
    measure();
    if (selected === undefined) grid.scrollTop = 0;
    draw(true);
    choose(chosen);
  }

  // The grid: only the cells in sight exist.
  const grid = $('grid'), rows = $('rows'), cells = new Map(), free = [];
  let across = 1, width = 100, height = 100;
  function measure() {
    const room = rows.clientWidth || grid.clientWidth, least = isText ? Math.min(290, room - 2 * GAP) : narrow.matches ? 100 : 116;
    across = Math.max(1, Math.floor((room - GAP) / (least + GAP)));
    width = Math.floor((room - GAP) / across) - GAP;
    height = !isText ? width + 42 : narrow.matches ? 124 : 150;
    rows.style.height = `${Math.max(1, Math.ceil(order.length / across)) * (height + GAP) + GAP}px`;
  }
  function blank() {
    const cell = make('div', 'cell');
    cell.setAttribute('role', 'option');
    const shown = isText ? make('div', 'words') : make('img');
    if (!isText) shown.decoding = 'async';
    const foot = make('div', 'foot');
    foot.append(make('div', 'given'), make('div', 'says'));
    foot.lastChild.append(make('span'), make('i'));
    cell.append(shown, make('div', 'mark'), foot);
    rows.append(cell);
    return cell;
  }
  const MARKS = {accept: () => '✓', relabel: v => `→ ${v}`, drop: () => '✕'};
  function mark(cell, i) {
    const [decision, to] = decisions.get(i) || [''];
    cell.className = `cell ${decision}`;
    cell.children[1].textContent = decision ? MARKS[decision](to) : '';
  }
  function fill(cell, at) {
    const i = order[at], [shown, , foot] = cell.children, [given, says] = foot.children;
    cell.id = `sample-${i}`;
    cell.dataset.at = at;
    cell.style.cssText = `width:${width}px;height:${height}px;transform:translate(${GAP + (at % across) * (width + GAP)}px,` +
      `${GAP + Math.floor(at / across) * (height + GAP)}px)`;
    if (isText) {
      shown.textContent = data.text[i].slice(0, 400) || data.path[i] || `sample ${data.index[i]}`;
      shown.style.height = `${height - 46}px`;
    } else {
      shown.style.height = `${width}px`;
      if (hasPicture(i)) shown.src = source(i); else shown.removeAttribute('src');
      shown.alt = `sample ${data.index[i]}`;
    }
    given.textContent = label(data.given[i]);
    says.firstChild.textContent = agrees(i) ? '= agrees' : `≠ ${label(data.predicted[i])}`;
    says.lastChild.textContent = percent(columns.confidence[i]);
    cell.title = agrees(i) ? `given ${label(data.given[i])}, the model agrees`
      : `given ${label(data.given[i])}, the model says ${label(data.predicted[i])}`;
    says.className = agrees(i) ? 'says' : 'says differs';
    cell.setAttribute('aria-selected', at === chosen);
    cell.setAttribute('aria-setsize', order.length);
    cell.setAttribute('aria-posinset', at + 1);
    mark(cell, i);
  }
  function draw(anew) {
    const tall = height + GAP, first = Math.max(0, Math.floor(grid.scrollTop / tall) - BUFFER) * across;
    const last = Math.min(order.length, (Math.ceil((grid.scrollTop + grid.clientHeight) / tall) + BUFFER) * across);
    for (const [at, cell] of cells) if (anew || at < first || at >= last) {
      cells.delete(at);
      free.push(cell);
    }
    for (let at = first; at < last; at++) if (!cells.has(at)) {
      const cell = free.pop() || blank();
      cell.hidden = false;
      fill(cell, at);
      cells.set(at, cell);
    }
    for (const cell of free) {
      cell.hidden = true;
      cell.removeAttribute('id');
    }
    let none = $('none');
    if (!order.length && !none) {
      none = make('p', 'empty', 'No sample fits these filters.');
      none.id = 'none';
      grid.prepend(none);
    } else if (order.length && none) none.remove();
    $('decided').textContent = decisions.size.toLocaleString('en');
  }
  let drawing = 0;
  grid.addEventListener('scroll', () => {
    if (!drawing) drawing = requestAnimationFrame(() => { drawing = 0; draw(false); });
  }, {passive: true});
  new ResizeObserver(() => { measure(); draw(true); inSight(); }).observe(grid);

  // The chosen sample
  function inSight() {
    const tall = height + GAP, top = Math.floor(chosen / across) * tall;
    if (top < grid.scrollTop) grid.scrollTop = top;
    else if (top + tall + GAP > grid.scrollTop + grid.clientHeight) grid.scrollTop = top + tall + GAP - grid.clientHeight;
  }
  function choose(at) {
    const before = cells.get(chosen);
    if (before) before.setAttribute('aria-selected', false);
    chosen = Math.min(Math.max(0, at), Math.max(0, order.length - 1));
    inSight();
    draw(false);
    const cell = cells.get(chosen);
    if (cell) {
      cell.setAttribute('aria-selected', true);
      grid.setAttribute('aria-activedescendant', cell.id);
    } else grid.removeAttribute('aria-activedescendant');
    detail();
  }
  const FACTS = [['score', 'score', number], ['probability', 'probability to be right', percent],
    ['weight', 'weight', number], ['loss', 'loss', number], ['disagreement', 'disagreement', percent]];
  const DONE = {accept: () => '✓ Accepted', relabel: to => `→ Relabelled ${to}`, drop: () => '✕ Dropped'};
  function detail() {
    const i = order[chosen], there = i !== undefined;
    for (const id of ['picture', 'labels', 'decision', 'text', 'reason', 'facts']) $(id).replaceChildren();
    for (const button of $('actions').children) button.disabled = !there && button.dataset.do !== 'undo';
    if (!there) return;
    if (!isText && hasPicture(i)) {
      const picture = make('img');
      picture.src = source(i);
      picture.alt = `sample ${data.index[i]}`;
      $('picture').append(picture);
    }
    const says = `${label(data.predicted[i])} ${percent(columns.confidence[i])}`;
    $('labels').append(make('dt', '', 'Given'), make('dd', '', label(data.given[i])), make('dt', '', 'Model'),
      make('dd', agrees(i) ? '' : 'differs', says));
    const [decision, to] = decisions.get(i) || [''];
    $('decision').className = decision;
    $('decision').textContent = decision ? DONE[decision](to) : '';
    $('text').textContent = isText ? data.text[i] : '';
    $('reason').textContent = data.reason[i];
    const facts = [['index', data.index[i]]];
    if (data.path[i]) facts.push(['file', data.path[i]]);
    for (const [name, words, form] of FACTS) if (columns[name][i] !== null) facts.push([words, form(columns[name][i])]);
    for (const [name, value] of facts) $('facts').append(make('dt', '', name), make('dd', '', value));
  }

  // Deciding
  let silence = 0;
  function say(words) {
    $('said').textContent = words;
    $('said').classList.add('shown');
    clearTimeout(silence);
    silence = setTimeout(() => $('said').classList.remove('shown'), 1800);
  }
  function put(i, value) {
    if (value) decisions.set(i, value); else decisions.delete(i);
    const at = order.indexOf(i), cell = cells.get(at);
    if (cell) mark(cell, i);
    $('decided').textContent = decisions.size.toLocaleString('en');
    later();
  }
  function decide(decision, to) {
    const i = order[chosen];
    if (i === undefined) return;
    undone.push([i, decisions.get(i)]);
    put(i, decision ? [decision, to] : undefined);
    const kept = storable ? '' : '; this browser keeps nothing: export before you close the page';
    say((decision ? `${DONE[decision](to)}: sample ${data.index[i]}` : `Decision on sample ${data.index[i]} taken back`) + kept);
    choose(decision ? chosen + 1 : chosen);
  }
  function undo() {
    if (!undone.length) return say('Nothing to undo');
    const [i, before] = undone.pop();
    put(i, before);
    say(`Undone: sample ${data.index[i]}`);
    const at = order.indexOf(i);
    if (at >= 0) choose(at); else detail();
  }
  const ACTIONS = {accept: () => decide('accept', label(data.given[order[chosen]])), relabel: openPicker,
    drop: () => decide('drop', ''), undo};
  $('actions').addEventListener('click', event => {
    const button = event.target.closest('button');
    if (button) ACTIONS[button.dataset.do]();
  });

  // Choosing another label
  const picker = $('picker'), MOST = 60;
  let offered = [], picked = 0;
  function openPicker() {
    const i = order[chosen];
    if (i === undefined) return;
    $('which').textContent = data.index[i];
    $('pick').value = '';
    $('pick').type = classes ? 'search' : 'number';
    $('pick').step = 'any';
    $('pick').placeholder = classes ? 'type to find a class' : 'a number';
    offer();
    picker.showModal();
    $('pick').focus();
  }
  function offer() {
    const i = order[chosen], typed = $('pick').value.trim().toLowerCase();
    const first = v => v === data.predicted[i] ? 0 : typed && classes[v].toLowerCase().startsWith(typed) ? 1 : 2;
    offered = (classes || []).map((_, v) => v)
      .filter(v => v !== data.given[i] && (!typed || classes[v].toLowerCase().includes(typed)))
      .sort((a, b) => first(a) - first(b) || a - b).slice(0, MOST);
    picked = 0;
    $('options').replaceChildren(...offered.map(v => {
      const item = make('li', '', classes[v]);
      item.setAttribute('role', 'option');
      if (v === data.predicted[i]) item.append(' ', make('small', '', 'the model says so'));
      return item;
    }));
    light();
  }
  function light() {
    [...$('options').children].forEach((item, k) => item.setAttribute('aria-selected', k === picked));
    if ($('options').children[picked]) $('options').children[picked].scrollIntoView({block: 'nearest'});
  }
  function take() {
    const typed = $('pick').value.trim();
    const to = classes ? classes[offered[picked]] : typed !== '' && isFinite(+typed) ? typed : undefined;
    if (to === undefined) return;
    picker.close();
    decide('relabel', to);
  }
  $('pick').addEventListener('input', offer);
  $('pick').addEventListener('keydown', event => {
    const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
    if (step && classes) picked = Math.min(Math.max(0, picked + step), offered.length - 1);
    if (step && classes) light();
    if (event.key === 'Enter') take();
    if ((step && classes) || event.key === 'Enter') event.preventDefault();
  });
  $('options').addEventListener('click', event => {
    picked = [...$('options').children].indexOf(event.target.closest('li'));
    if (picked >= 0) take();
  });
  for (const dialog of [picker, $('keys')]) {
    dialog.addEventListener('click', event => { if (event.target === dialog) dialog.close(); });
    dialog.addEventListener('close', () => grid.focus());
  }

  // Export
  const quoted = v => /[",\r\n]|^\s|\s$/.test(v) ? `"${v.replaceAll('"', '""')}"` : v;
  function csv() {
    const lines = [...decisions].sort(([a], [b]) => a - b)
      .map(([i, [decision, to]]) => [data.index[i], decision, label(data.given[i]), to, ...(data.mark ? [data.marks[i]] : [])].map(v => quoted(String(v))).join(','));
    return [`index,decision,given,label${data.mark ? ',' + data.mark : ''}`, ...lines].join('\n') + '\n';
  }
  function save() {
    if (!decisions.size) return say('No decision yet: accept (a), relabel (r) or drop (d) a sample');
    const link = make('a'), address = URL.createObjectURL(new Blob([csv()], {type: 'text/csv'}));
    link.href = address;
    link.download = 'decisions.csv';
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    say(`Exported ${decisions.size.toLocaleString('en')} decisions`);
  }

  // Controls
  function options(select, column) {
    const counts = new Map();
    for (const v of column) counts.set(v, (counts.get(v) || 0) + 1);
    select.add(new Option('any', ''));
    (classes || []).forEach((name, v) => {
      if (counts.has(v)) select.add(new Option(`${name} (${counts.get(v).toLocaleString('en')})`, v));
    });
    if (!classes) select.parentElement.hidden = true;
  }
  options($('given'), data.given);
  options($('predicted'), data.predicted);
  let byPointer = false;
  $('controls').addEventListener('pointerdown', () => { byPointer = true; });
  $('controls').addEventListener('keydown', () => { byPointer = false; });
  $('controls').addEventListener('submit', event => { event.preventDefault(); grid.focus(); });
  $('controls').addEventListener('change', event => {
    if (event.target.id === 'find') return;
    if (event.target.id === 'sort') descending = SORTS.find(([name]) => name === event.target.value)[2] < 0;
    arrange();
    if (byPointer) grid.focus();
  });
  let typing = 0;
  $('find').addEventListener('input', () => { clearTimeout(typing); typing = setTimeout(() => arrange(), 120); });
  $('direction').addEventListener('click', () => { descending = !descending; arrange(); });
  $('filters').addEventListener('click', () => {
    $('filters').setAttribute('aria-expanded', $('controls').classList.toggle('open'));
  });
  $('help').addEventListener('click', () => $('keys').showModal());
  $('export').addEventListener('click', save);
  grid.addEventListener('click', event => {
    const cell = event.target.closest('.cell');
    if (cell) choose(+cell.dataset.at);
    grid.focus({preventScroll: true});
  });

  // Keys
  const page = () => across * Math.max(1, Math.floor(grid.clientHeight / (height + GAP)));
  const KEYS = {ArrowLeft: () => choose(chosen - 1), ArrowRight: () => choose(chosen + 1), ArrowUp: () => move(-across),
    ArrowDown: () => move(across), PageUp: () => move(-page()), PageDown: () => move(page()), Home: () => choose(0),
    End: () => choose(order.length - 1), a: ACTIONS.accept, r: openPicker, d: ACTIONS.drop, u: undo,
    Delete: clear, Backspace: clear, e: save, '?': () => $('keys').showModal(), '/': () => $('find').focus()};
  function move(step) {
    const to = chosen + step;
    if (to >= 0 && to < order.length) choose(to);
    else if (Math.abs(step) > across || (step > 0 && Math.floor(chosen / across) < Math.floor((order.length - 1) / across)))
      choose(to);
  }
  function clear() { if (decisions.has(order[chosen])) decide(''); }
  document.addEventListener('keydown', event => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) return;
    if (event.target.closest('input, select, textarea')) {
      const find = event.target.id === 'find';
      if (find && event.key === 'Escape' && $('find').value) {
        $('find').value = '';
        arrange();
      }
      if (event.key === 'Escape' || (find && event.key === 'Enter')) grid.focus();
      return;
    }
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (!Object.hasOwn(KEYS, key) || (event.repeat && 'ardu'.includes(key))) return;
    if (event.target.closest('button') && key.length > 1 && !key.startsWith('Arrow')) return;
    event.preventDefault();
    KEYS[key]();
  });

  // Start
  read();
  descending = SORTS[0][2] < 0;
  arrange();
  grid.focus();
  const pictures = [...rows.querySelectorAll('img[src]')].map(picture => picture.decode().catch(() => 0));
  Promise.all(pictures).then(() => requestAnimationFrame(() => requestAnimationFrame(() => {
    document.documentElement.dataset.ready = performance.now().toFixed(1);
  })));
})();
