/* The process that holds a pod's namespaces: it reaps what the pod leaves and ends when it is told to. In C, since a
 * runtime with threads would be the first victim of a fork bomb beside it. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int signal) {
    (void)signal;
    _exit(0);
}

static void reap(int signal) {
    (void)signal;
    while (waitpid(-1, 0, WNOHANG) > 0) {
    }
}

int main(void) {
    struct sigaction ending = {.sa_handler = end}, reaping = {.sa_handler = reap, .sa_flags = SA_NOCLDSTOP};
    sigaction(SIGINT, &ending, 0);
    sigaction(SIGTERM, &ending, 0);
    sigaction(SIGCHLD, &reaping, 0);
    for (;;) {
        pause();
    }
}
