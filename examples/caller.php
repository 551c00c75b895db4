<?php
// Ask taskd for a task with nothing but a socket: php caller.php [PORT]
$connection = stream_socket_client('tcp://127.0.0.1:' . ($argv[1] ?? 12345));
if (!$connection) {
    exit(1);
}
fwrite($connection, json_encode([
    'function' => 'send_mail',
    'args' => ['from' => 'me@example.org', 'to' => 'you@example.org', 'contents' => 'Olá!'],
]) . "\n");
$result = json_decode(fgets($connection), true);
var_dump($result);
exit(isset($result['error']) ? 1 : 0);
