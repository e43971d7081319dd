/* A stand-in for NVIDIA's pyxis on the dev cluster, so that what is rendered for pyxis meets a real srun.
 *
 * It is not pyxis. It takes the options of pyxis that prism-launch renders and no others, runs as root alone, and enters
 * an image that is a folder:
 *   --container-image=PATH               a root file system; what is written to it is gone with the task
 *   --container-mounts=SRC:DST[:ro],...  bind mounts; targets are made
 *   --container-workdir=PATH             must be there
 *   --no-container-mount-home, --no-container-entrypoint   what it does anyway
 * As in pyxis, the image's variables win over the job's: the lines NAME=VALUE of its /etc/environment, where enroot
 * keeps them. The batch script stays on the host.
 *
 *   gcc -shared -fPIC -o pyxis_stand_in.so pyxis_stand_in.c       (slurm/spank.h is in Debian's libslurm-dev)
 *   echo "required /full/path/pyxis_stand_in.so" >> plugstack.conf
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

SPANK_PLUGIN(pyxis_stand_in, 1);

enum { IMAGE, MOUNTS, WORKDIR, STATED, COUNT };

static char *given[COUNT];

static int keep(int which, const char *value, int remote) {
    (void)remote;
    if (which != STATED) {
        free(given[which]);
        given[which] = strdup(value);
    }
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "PATH", "stand-in for pyxis: folder with a root file system", 1, IMAGE, keep},
    {"container-mounts", "SRC:DST[:ro],...", "stand-in for pyxis: bind mounts", 1, MOUNTS, keep},
    {"container-workdir", "PATH", "stand-in for pyxis: working directory", 1, WORKDIR, keep},
    {"no-container-mount-home", NULL, "stand-in for pyxis: always so", 0, STATED, keep},
    {"no-container-entrypoint", NULL, "stand-in for pyxis: always so", 0, STATED, keep},
    SPANK_OPTIONS_TABLE_END};

int slurm_spank_init(spank_t spank, int argc, char **argv) {
    (void)argc;
    (void)argv;
    for (struct spank_option *option = options; option->name; option++)
        if (spank_option_register(spank, option) != ESPANK_SUCCESS)
            return -1;
    return 0;
}

static int fail(const char *what, const char *path) {
    slurm_error("pyxis stand-in: %s %s: %s", what, path, strerror(errno));
    return -1;
}

/* The path and all that it lies in: folders, and at its end an empty file where `like` is one. */
static int make_target(const char *path, const char *like) {
    char part[PATH_MAX];
    struct stat source;
    if (stat(like, &source) != 0)
        return fail("no such mount source", like);
    snprintf(part, sizeof part, "%s", path);
    for (char *end = part + 1; *end; end++)
        if (*end == '/') {
            *end = '\0';
            mkdir(part, 0755);
            *end = '/';
        }
    if (S_ISDIR(source.st_mode))
        mkdir(part, 0755);
    else {
        FILE *file = fopen(part, "a");
        if (file)
            fclose(file);
    }
    return 0;
}

static int bind_into(const char *root, const char *source, const char *target, int read_only) {
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s%s", root, target) >= (int)sizeof path)
        return fail("path too long", target);
    if (make_target(path, source) != 0)
        return -1;
    if (mount(source, path, NULL, MS_BIND | MS_REC, NULL) != 0)
        return fail("cannot mount on", path);
    if (read_only && mount(NULL, path, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL) != 0)
        return fail("cannot make read-only", path);
    return 0;
}

/* SRC:DST[:FLAGS],...: commas and colons cannot be quoted, as in pyxis. */
static int bind_all(const char *root, const char *mounts) {
    char *rest = strdup(mounts), *at = rest, *one;
    int result = 0;
    while (result == 0 && (one = strsep(&at, ",")) != NULL) {
        char *source = strsep(&one, ":"), *target = strsep(&one, ":");
        result = bind_into(root, source, target ? target : source, one && strcmp(one, "ro") == 0);
    }
    free(rest);
    return result;
}

/* A writable view of the image that goes with this mount namespace. */
static int show_image(const char *image, char *root, size_t size) {
    static const char base[] = "/mnt";
    char layers[3 * PATH_MAX];
    if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
        return fail("no mount namespace for", image);
    if (mount("tmpfs", base, "tmpfs", 0, "mode=0755") != 0)
        return fail("no tmpfs on", base);
    mkdir("/mnt/upper", 0755);
    mkdir("/mnt/work", 0755);
    mkdir("/mnt/root", 0755);
    snprintf(layers, sizeof layers, "lowerdir=%s,upperdir=/mnt/upper,workdir=/mnt/work", image);
    snprintf(root, size, "/mnt/root");
    return mount("overlay", root, "overlay", 0, layers) == 0 ? 0 : fail("no overlay of", image);
}

static void take_environment(spank_t spank, const char *root) {
    char path[PATH_MAX], line[4096];
    snprintf(path, sizeof path, "%s/etc/environment", root);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        char *equals = strchr(line, '=');
        if (equals) {
            *equals = '\0';
            spank_setenv(spank, line, equals + 1, 1);
        }
    }
    if (file)
        fclose(file);
}

/* After the task has become the user and before it starts the command. */
int slurm_spank_task_init(spank_t spank, int argc, char **argv) {
    static const char *machine[] = {"/proc", "/sys", "/dev", "/etc/hosts", NULL};
    uint32_t step = 0;
    char root[PATH_MAX];
    (void)argc;
    (void)argv;
    if (given[IMAGE] == NULL)
        return 0;
    if (spank_get_item(spank, S_JOB_STEPID, &step) == ESPANK_SUCCESS && step == SLURM_BATCH_SCRIPT)
        return 0;
    if (show_image(given[IMAGE], root, sizeof root) != 0)
        return -1;
    for (const char **path = machine; *path; path++)
        if (bind_into(root, *path, *path, 0) != 0)
            return -1;
    if (given[MOUNTS] && bind_all(root, given[MOUNTS]) != 0)
        return -1;
    take_environment(spank, root);
    if (chroot(root) != 0)
        return fail("cannot enter", root);
    if (chdir(given[WORKDIR] ? given[WORKDIR] : "/") != 0)
        return fail("couldn't chdir to", given[WORKDIR]);
    return 0;
}
