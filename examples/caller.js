// Ask taskd for a task with nothing but a socket: node caller.js [PORT [HOST]]
// With TASKD_CA=ca.pem it speaks TLS, and that authority vouches for the daemon;
// with TASKD_TOKEN=… it shows a token first.
const fs = require('fs');
const net = require('net');
const readline = require('readline');
const tls = require('tls');

const [port = 12345, host = '127.0.0.1'] = process.argv.slice(2);
const { TASKD_CA: ca, TASKD_TOKEN: token } = process.env;

function fail(error) {
  console.error(`caller.js: ${error.message || error.code}`);
  process.exit(1);
}

const requests = [{
  function: 'send_mail',
  args: { from: 'me@example.org', to: 'you@example.org', contents: 'Olá!' },
}];
if (token) {
  requests.unshift({ function: 'taskd.auth', args: { token } });
}

const connection = ca
  ? tls.connect({ port, host, ca: fs.readFileSync(ca) })
  : net.connect({ port, host });
connection.on('error', fail);
connection.write(requests.map((request) => JSON.stringify(request) + '\n').join(''));

let missing = requests.length;
readline.createInterface({ input: connection }).on('line', (line) => {
  const result = JSON.parse(line);
  missing -= 1;
  if (missing === 0 || result?.error) {
    console.log(result);
    process.exit(result?.error ? 1 : 0);
  }
}).on('close', () => fail(new Error('no reply came')));
