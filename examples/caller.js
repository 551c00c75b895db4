// Ask taskd for a task with nothing but a socket: node caller.js [PORT]
const net = require('net');

const connection = net.connect(process.argv[2] || 12345, '127.0.0.1');
connection.setEncoding('utf8');
connection.write(JSON.stringify({
  function: 'send_mail',
  args: { from: 'me@example.org', to: 'you@example.org', contents: 'Olá!' },
}) + '\n');

let reply = '';
connection.on('data', (piece) => {
  reply += piece;
  if (reply.endsWith('\n')) {
    const result = JSON.parse(reply);
    console.log(result);
    process.exitCode = result.error ? 1 : 0;
    connection.end();
  }
});
