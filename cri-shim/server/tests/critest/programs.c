/* The programs that critest's images need and busybox does not have, in one static binary that goes by its name. */
#include <arpa/inet.h>
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef SIOCBRADDBR
#define SIOCBRADDBR 0x89a0
#endif

static void end(int signal) {
    (void)signal;
    _exit(0);
}

/* Answers every request with one page. */
static int serve(int port) {
    static const char page[] = "HTTP/1.0 200 OK\r\nContent-Length: 3\r\nContent-Type: text/plain\r\n\r\nok\n";
    /* PID 1 of a container ignores what it does not handle. */
    signal(SIGTERM, end);
    signal(SIGQUIT, end);
    signal(SIGPIPE, SIG_IGN);
    int on = 1, s = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_ANY)};
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(s, (struct sockaddr *)&at, sizeof at) || listen(s, 16)) {
        perror("listen");
        return 1;
    }
    for (;;) {
        int c = accept(s, NULL, NULL);
        char request[4096];
        if (c < 0)
            continue;
        if (read(c, request, sizeof request) > 0 && write(c, page, sizeof page - 1) < 0)
            perror("write");
        close(c);
    }
}

/* nginx "master process" [PORT] */
static int nginx(int argc, char **argv) {
    FILE *f = fopen("/var/run/nginx.pid", "w");
    if (f) {
        fprintf(f, "%d\n", getpid());
        fclose(f);
    }
    return serve(argc > 2 ? atoi(argv[2]) : 80);
}

static int httpd(void) {
    puts("httpd: ready");
    fflush(stdout);
    return serve(80);
}

static int pgrep(const char *name) {
    int found = 0;
    struct dirent *e;
    DIR *proc = opendir("/proc");
    while (proc && (e = readdir(proc))) {
        char path[300], comm[64] = "";
        snprintf(path, sizeof path, "/proc/%s/comm", e->d_name);
        FILE *f = atoi(e->d_name) > 0 ? fopen(path, "r") : NULL;
        if (!f)
            continue;
        if (fgets(comm, sizeof comm, f) && strstr(comm, name)) {
            puts(e->d_name);
            found = 1;
        }
        fclose(f);
    }
    return !found;
}

static int ipcs(void) {
    char line[512];
    FILE *f = fopen("/proc/sysvipc/shm", "r");
    while (f && fgets(line, sizeof line, f))
        fputs(line, stdout);
    return !f;
}

/* ls [-A] DIR */
static int ls(const char *dir) {
    struct dirent *e;
    DIR *d = opendir(dir);
    if (!d) {
        perror(dir);
        return 1;
    }
    while ((e = readdir(d)))
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
            puts(e->d_name);
    return 0;
}

static int brctl(const char *name) {
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    if (ioctl(s, SIOCBRADDBR, name)) {
        perror("add bridge");
        return 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    const char *me = strrchr(argv[0], '/');
    me = me ? me + 1 : argv[0];
    if (!strcmp(me, "nginx"))
        return nginx(argc, argv);
    if (!strcmp(me, "httpd"))
        return httpd();
    if (!strcmp(me, "ls"))
        return ls(argc > 1 ? argv[argc - 1] : ".");
    if (!strcmp(me, "ipcs"))
        return ipcs();
    if (!strcmp(me, "pgrep") && argc > 1)
        return pgrep(argv[argc - 1]);
    if (!strcmp(me, "brctl") && argc > 2)
        return brctl(argv[2]);
    if (!strcmp(me, "nonewprivs")) {
        printf("Effective uid: %d\n", geteuid());
        return 0;
    }
    if (!strcmp(me, "pause")) {
        signal(SIGTERM, end);
        for (;;)
            pause();
    }
    fprintf(stderr, "%s: unknown program or missing argument\n", me);
    return 1;
}
