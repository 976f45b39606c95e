{{- define "greenroom.labels" -}}
app.kubernetes.io/name: greenroom
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "greenroom.selector" -}}
app.kubernetes.io/name: greenroom
app.kubernetes.io/component: {{ . }}
{{- end }}

{{- define "greenroom.image" -}}
{{- $image := .image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "greenroom.tlsSecret" -}}
{{ .Values.tls.existingSecret | default "greenroom-tls" }}
{{- end }}

{{- define "greenroom.tokensSecret" -}}
{{ .Values.tokens.existingSecret | default "greenroom-tokens" }}
{{- end }}

{{- define "greenroom.storeSecret" -}}
{{- if .Values.store.bundled.enabled -}}
greenroom-postgresql
{{- else -}}
{{ .Values.store.existingSecret }}
{{- end -}}
{{- end }}

{{- /* Where the snapshots are, as environment: as a value, or from the secret of the store. */}}
{{- define "greenroom.snapshotsEnv" -}}
- name: SNAPSHOTS_URL
  {{- if .Values.snapshots.url }}
  value: {{ .Values.snapshots.url | quote }}
  {{- else }}
  valueFrom:
    secretKeyRef: {name: {{ .Values.store.existingSecret }}, key: snapshots}
  {{- end }}
{{- end }}

{{- /* No privilege, nothing written but to volumes. */}}
{{- define "greenroom.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "greenroom.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- /* Names by which the control plane is reached: the Service's, the one that clients send, and a forwarded port's. */}}
{{- define "greenroom.dnsNames" -}}
{{- $ns := .Release.Namespace -}}
{{- concat (list "greenroom" (printf "greenroom.%s" $ns) (printf "greenroom.%s.svc" $ns) (printf "greenroom.%s.svc.cluster.local" $ns) "localhost") .Values.tls.extraNames | toJson -}}
{{- end }}

{{- define "greenroom.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "greenroom.spread" -}}
topologySpreadConstraints:
{{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "greenroom.selector" $.component | nindent 8 }}
{{- end }}
{{- end }}

{{- define "greenroom.dns" -}}
{{- with .dnsTo }}
- {{ if not (has dict .) }}to: {{- toYaml . | nindent 4 }}
  {{ end }}ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]
{{- end }}
{{- end }}

{{- /* Snapshots and registries. */}}
{{- define "greenroom.outside" -}}
{{- if .outside.ports }}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
        except: {{- toYaml .outside.except | nindent 10 }}
    - ipBlock:
        cidr: ::/0
        except: {{- toYaml .outside.except6 | nindent 10 }}
  ports:
    {{- range .outside.ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end }}
{{- with .insideTo }}
{{ toYaml . }}
{{- end }}
{{- end }}
