<?php
// Ask taskd for a task with nothing but a socket: php caller.php [PORT [HOST]]
// With TASKD_CA=ca.pem it speaks TLS, and that authority vouches for the daemon;
// with TASKD_TOKEN=… it shows a token first.
$address = ($argv[2] ?? '127.0.0.1') . ':' . ($argv[1] ?? 12345);
$ca = getenv('TASKD_CA');
$token = getenv('TASKD_TOKEN');

function fail($message)
{
    fwrite(STDERR, 'caller.php: ' . strtr($message, "\n", ' ') . "\n");
    exit(1);
}

function ask($connection, $function, $args)
{
    fwrite($connection, json_encode(['function' => $function, 'args' => $args]) . "\n");
    $line = fgets($connection);
    return $line === false ? fail('no reply came') : json_decode($line, true);
}

set_error_handler(fn ($level, $message) => fail($message));
$connection = stream_socket_client(
    ($ca ? 'tls://' : 'tcp://') . $address,
    $code,
    $error,
    10,
    STREAM_CLIENT_CONNECT,
    stream_context_create(['ssl' => ['cafile' => $ca]])
);
$result = $token ? ask($connection, 'taskd.auth', ['token' => $token]) : null;
if (!isset($result['error'])) {
    $mail = ['from' => 'me@example.org', 'to' => 'you@example.org', 'contents' => 'Olá!'];
    $result = ask($connection, 'send_mail', $mail);
}
var_dump($result);
exit(isset($result['error']) ? 1 : 0);
