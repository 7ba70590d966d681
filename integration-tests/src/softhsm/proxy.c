// A PKCS#11 module that hands every call on to SoftHSM, writes some of them down, and fails where a test wants it to.
// In the folder that PROXY_FOLDER names:
//   calls     gets a line for every call that is watched: C_Login
//   NAME      of a watched call: "b3" makes it return that code in hexadecimal, "once b3" the first time only, "hang" makes it
//             wait until the file is gone
//   flags     in hexadecimal: further flags of every token
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long ulong;
// CK_FUNCTION_LIST of PKCS #11 2.40: a version, then the functions in the standard's order.
struct list { unsigned char version[2]; void *f[68]; };
enum { INITIALIZE = 0, GET_FUNCTION_LIST = 3, GET_TOKEN_INFO = 6, OPEN_SESSION = 12, LOGIN = 18, SIGN_INIT = 42, SIGN = 43 };
static struct list real, ours;

static int content(const char *name, char *text, size_t size, char *path, size_t path_size) {
    snprintf(path, path_size, "%s/%s", getenv("PROXY_FOLDER"), name);
    int file = open(path, O_RDONLY);
    if (file < 0) return 0;
    ssize_t length = read(file, text, size - 1);
    close(file);
    text[length < 0 ? 0 : length] = 0;
    return 1;
}

static ulong fault(const char *name) {
    char path[512], text[64], line[64];
    snprintf(path, sizeof path, "%s/calls", getenv("PROXY_FOLDER"));
    int calls = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    int length = snprintf(line, sizeof line, "%s\n", name);
    if (write(calls, line, length) != length) abort();
    close(calls);
    while (content(name, text, sizeof text, path, sizeof path)) {
        if (!strncmp(text, "hang", 4)) { usleep(1000); continue; }
        if (strncmp(text, "once ", 5)) return strtoul(text, NULL, 16);
        // Of several threads the one that removes it.
        if (!unlink(path)) return strtoul(text + 5, NULL, 16);
    }
    return 0;
}

#define WATCHED(name, index, parameters, arguments)                                        \
    static ulong name parameters {                                                         \
        ulong code = fault(#name);                                                         \
        return code ? code : ((ulong(*) parameters)real.f[index])arguments;                \
    }
WATCHED(C_Initialize, INITIALIZE, (void *a), (a))
WATCHED(C_OpenSession, OPEN_SESSION, (ulong a, ulong b, void *c, void *d, ulong *e), (a, b, c, d, e))
WATCHED(C_Login, LOGIN, (ulong a, ulong b, void *c, ulong d), (a, b, c, d))
WATCHED(C_SignInit, SIGN_INIT, (ulong a, void *b, ulong c), (a, b, c))
WATCHED(C_Sign, SIGN, (ulong a, void *b, ulong c, void *d, ulong *e), (a, b, c, d, e))

static ulong C_GetTokenInfo(ulong slot, unsigned char *info) {
    ulong code = ((ulong(*)(ulong, void *))real.f[GET_TOKEN_INFO])(slot, info);
    char path[512], text[64];
    ulong flags;
    if (!code && content("flags", text, sizeof text, path, sizeof path)) {
        memcpy(&flags, info + 96, sizeof flags);
        flags |= strtoul(text, NULL, 16);
        memcpy(info + 96, &flags, sizeof flags);
    }
    return code;
}

ulong C_GetFunctionList(struct list **list) {
    void *module = dlopen(getenv("PROXY_MODULE"), RTLD_NOW | RTLD_LOCAL);
    ulong (*get)(struct list **) = module ? (ulong(*)(struct list **))dlsym(module, "C_GetFunctionList") : NULL;
    struct list *found;
    if (!get || get(&found)) return 5;
    real = ours = *found;
    ours.f[INITIALIZE] = C_Initialize;
    ours.f[GET_FUNCTION_LIST] = C_GetFunctionList;
    ours.f[GET_TOKEN_INFO] = C_GetTokenInfo;
    ours.f[OPEN_SESSION] = C_OpenSession;
    ours.f[LOGIN] = C_Login;
    ours.f[SIGN_INIT] = C_SignInit;
    ours.f[SIGN] = C_Sign;
    *list = &ours;
    return 0;
}
