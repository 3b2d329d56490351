// A plugin for the tests of the CRI server, made of upstream's stub: it notes what it is asked and answers as its script says.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
)

// script is read anew for each event.
type script struct {
	// Log is where events are noted, for plugins without flags.
	Log string `json:"log"`
	// Containers are adjusted by their names.
	Containers map[string]struct {
		Adjust *api.ContainerAdjustment `json:"adjust"`
		Update []*api.ContainerUpdate   `json:"update"`
	} `json:"containers"`
	// Resources are what an update becomes.
	Resources *api.LinuxResources `json:"resources"`
	// Hang, Refuse and Exit name events.
	Hang   []string          `json:"hang"`
	Refuse map[string]string `json:"refuse"`
	Exit   []string          `json:"exit"`
	// Policy is the plugin's own.
	Policy *api.FailurePolicy `json:"policy"`
}

type plugin struct {
	mutex  sync.Mutex
	log    string
	file   string
	config string
}

func (p *plugin) script() (s script) {
	text := []byte(p.config)
	if p.file != "" {
		text, _ = os.ReadFile(p.file)
	}
	if len(text) > 0 {
		if err := json.Unmarshal(text, &s); err != nil {
			panic(err)
		}
	}
	return s
}

func (p *plugin) note(event string, data any) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	line, err := json.Marshal(map[string]any{"event": event, "data": data})
	if err != nil {
		panic(err)
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		panic(err)
	}
	defer log.Close()
	log.Write(append(line, '\n'))
}

// event notes an event and does what the script says of it.
func (p *plugin) event(name string, pod *api.PodSandbox, container *api.Container) (script, error) {
	p.note(name, map[string]any{"pod": pod, "container": container})
	s := p.script()
	if slices.Contains(s.Exit, name) {
		os.Exit(1)
	}
	if slices.Contains(s.Hang, name) {
		time.Sleep(time.Hour)
	}
	if text, ok := s.Refuse[name]; ok {
		return s, errors.New(text)
	}
	return s, nil
}

func (p *plugin) Configure(_ context.Context, config, runtime, version string) (api.EventMask, error) {
	if config != "" {
		p.config = config
	}
	if p.log == "" {
		p.log = p.script().Log
	}
	p.note("Configure", map[string]any{"config": config, "runtime": runtime, "version": version})
	return 0, nil
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	p.note("Synchronize", map[string]any{"pods": pods, "containers": containers})
	return nil, nil
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	_, err := p.event("RunPodSandbox", pod, nil)
	return err
}

func (p *plugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, overhead, resources *api.LinuxResources) error {
	p.note("UpdatePodSandbox", map[string]any{"pod": pod, "overhead": overhead, "resources": resources})
	return nil
}

func (p *plugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	_, err := p.event("PostUpdatePodSandbox", pod, nil)
	return err
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	_, err := p.event("StopPodSandbox", pod, nil)
	return err
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	_, err := p.event("RemovePodSandbox", pod, nil)
	return err
}

func (p *plugin) CreateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	s, err := p.event("CreateContainer", pod, c)
	return s.Containers[c.Name].Adjust, s.Containers[c.Name].Update, err
}

func (p *plugin) PostCreateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	_, err := p.event("PostCreateContainer", pod, c)
	return err
}

func (p *plugin) StartContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	_, err := p.event("StartContainer", pod, c)
	return err
}

func (p *plugin) PostStartContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	_, err := p.event("PostStartContainer", pod, c)
	return err
}

func (p *plugin) UpdateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container, r *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	p.note("UpdateContainer", map[string]any{"pod": pod, "container": c, "resources": r})
	s := p.script()
	if s.Resources == nil {
		return nil, nil
	}
	return []*api.ContainerUpdate{{ContainerId: c.Id, Linux: &api.LinuxContainerUpdate{Resources: s.Resources}}}, nil
}

func (p *plugin) PostUpdateContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	_, err := p.event("PostUpdateContainer", pod, c)
	return err
}

func (p *plugin) StopContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	_, err := p.event("StopContainer", pod, c)
	return nil, err
}

func (p *plugin) RemoveContainer(_ context.Context, pod *api.PodSandbox, c *api.Container) error {
	_, err := p.event("RemoveContainer", pod, c)
	return err
}

func (p *plugin) ValidateContainerAdjustment(_ context.Context, r *api.ValidateContainerAdjustmentRequest) error {
	p.note("ValidateContainerAdjustment", map[string]any{"container": r.Container, "adjust": r.Adjust, "owners": r.Owners})
	if text, ok := p.script().Refuse["ValidateContainerAdjustment"]; ok {
		return errors.New(text)
	}
	return nil
}

// commands asks for updates that nothing led to: a line of JSON each.
func (p *plugin) commands(current *stub.Stub) {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var update []*api.ContainerUpdate
		if err := json.Unmarshal([]byte(strings.TrimSpace(lines.Text())), &update); err != nil {
			panic(err)
		}
		failed, err := (*current).UpdateContainers(update)
		text := ""
		if err != nil {
			text = err.Error()
		}
		p.note("Updated", map[string]any{"failed": failed, "error": text})
	}
}

func main() {
	p := &plugin{}
	socket := flag.String("socket", "", "NRI's socket")
	name := flag.String("name", "", "the plugin's name")
	index := flag.String("idx", "", "the plugin's index")
	flag.StringVar(&p.log, "log", "", "where events are noted")
	flag.StringVar(&p.file, "script", "", "what to answer")
	flag.Parse()
	options := func() []stub.Option {
		all := []stub.Option{stub.WithOnClose(func() {})}
		if *socket != "" {
			all = append(all, stub.WithSocketPath(*socket), stub.WithPluginName(*name), stub.WithPluginIdx(*index))
		}
		if policy := p.script().Policy; policy != nil {
			all = append(all, stub.WithFailurePolicy(policy))
		}
		return all
	}
	var current stub.Stub
	for first := true; ; first = false {
		s, err := stub.New(p, options()...)
		if err != nil {
			panic(err)
		}
		current = s
		if first && *socket != "" {
			go p.commands(&current)
		}
		s.Run(context.Background())
		if *socket == "" {
			return
		}
		// The server is gone; it comes back, or another does.
		time.Sleep(50 * time.Millisecond)
	}
}
