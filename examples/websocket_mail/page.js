'use strict';

// One message asks for all mails, over a WebSocket of its own; what comes back is either
// {"error"} or, until "done" is "total", {"done", "failed", "total", "failures"}.
// All that is shown is set as text: an address may look like HTML.

const CLOSE_REASONS = {
  1006: 'The service cannot be reached.',
  1009: 'This is more than the service takes at once.',
};

const part = (id) => document.getElementById(id);
const number = new Intl.NumberFormat('en');

let socket = null;

function addresses() {
  return part('recipients').value.split(/[\s,;]+/).filter(Boolean);
}

function showCount() {
  const { length } = addresses();
  part('count').textContent = length === 0
    ? 'Addresses, one on each line.'
    : `${number.format(length)} ${length === 1 ? 'recipient' : 'recipients'}`;
}

function say(text, mood = '') {
  part('status').textContent = text;
  part('status').dataset.mood = mood;
}

// Set the page for mails that are on their way, or for none.
function setRunning(isRunning) {
  // Not disabled: the button would lose the focus of who sends by keyboard.
  part('send').setAttribute('aria-disabled', String(isRunning));
  part('stop').hidden = !isRunning;
}

function end(text, mood) {
  const ended = socket;
  socket = null;
  ended.close();
  if (document.activeElement === part('stop')) {
    part('send').focus();
  }
  setRunning(false);
  say(text, mood);
}

function showFailure({ to, why }) {
  const item = document.createElement('li');
  const address = document.createElement('strong');
  address.textContent = to;
  item.append(address, ` ${why}`);
  part('failures').append(item);
}

function show({ done, failed, total, failures }) {
  part('bar').max = total;
  part('bar').value = done;
  part('bar').textContent = `${done} of ${total}`;
  part('numbers').textContent = `${number.format(done)} of ${number.format(total)}`;
  if (part('run').hidden) {
    part('run').hidden = false;
    part('run').scrollIntoView({ block: 'nearest' });
  }
  failures.forEach(showFailure);
  part('failed').hidden = failed === 0;
  part('failed-title').textContent = `Not sent: ${number.format(failed)}`;

  if (done === total) {
    const sent = `${number.format(total - failed)} of ${number.format(total)}`;
    end(`Done. ${sent} mails sent.`, failed === 0 ? 'good' : 'bad');
  }
}

function send(message) {
  const url = new URL('ws', window.location.href);
  url.protocol = url.protocol === 'https:' ? 'wss:' : 'ws:';
  const opened = new WebSocket(url);
  socket = opened;
  opened.onopen = () => opened.send(JSON.stringify(message));
  opened.onmessage = (event) => {
    if (socket !== opened) {
      return; // it was stopped, and this was on its way
    }
    const news = JSON.parse(event.data);
    if (news.error) {
      end(news.error, 'bad');
    } else {
      show(news);
    }
  };
  opened.onclose = (event) => {
    if (socket === opened) {
      end(CLOSE_REASONS[event.code] || `The service has hung up (${event.code}).`, 'bad');
    }
  };
}

part('mail').addEventListener('submit', (event) => {
  event.preventDefault();
  if (socket !== null) {
    return;
  }
  part('run').hidden = true;
  part('numbers').textContent = '';
  part('failures').replaceChildren();
  setRunning(true);
  say('Sending…');
  send({
    from: part('from').value.trim(),
    subject: part('subject').value,
    contents: part('contents').value,
    recipients: addresses(),
  });
});

function stop() {
  // What workers have begun meanwhile cannot be called back.
  end(`Stopped at ${part('numbers').textContent || '0'}. Some more may have gone out.`);
}

part('stop').addEventListener('click', stop);
// A page that is left may live on in the browser's cache, and its connection with it.
window.addEventListener('pagehide', () => socket !== null && stop());

part('fill').addEventListener('click', () => {
  const many = part('many');
  if (many.reportValidity()) {
    part('recipients').value = Array.from(
      { length: many.valueAsNumber },
      (_, index) => `user${index + 1}@example.org`,
    ).join('\n');
    showCount();
  }
});

part('recipients').addEventListener('input', showCount);
showCount(); // a browser may have kept what was there before a reload
